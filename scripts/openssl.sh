# Sourced before cargo: says by $features whether TLS with shared keys (PSK) can be built, which takes OpenSSL's headers.
#
#   . scripts/openssl.sh static     for a program that is linked statically: finds libssl.a, and names it to openssl-sys
#   . scripts/openssl.sh shared     for everything else
# shellcheck shell=sh disable=SC2034

features=""
openssl_trial=$(mktemp)
openssl_main='#include <openssl/ssl.h>
int main(void) { return SSL_CTX_new(TLS_method()) == 0; }'
if [ "$1" = static ]; then
    openssl_link="-static -lssl -lcrypto"
else
    openssl_link="-lssl -lcrypto"
fi
# shellcheck disable=SC2086 # a list of words
if pkg-config --exists openssl 2>/dev/null &&
    printf '%s\n' "$openssl_main" | cc -x c - $(pkg-config --cflags --libs-only-L openssl) $openssl_link -o "$openssl_trial" 2>/dev/null
then
    if [ "$1" = static ]; then
        OPENSSL_STATIC=1
        OPENSSL_LIB_DIR=$(pkg-config --variable=libdir openssl)
        OPENSSL_INCLUDE_DIR=$(pkg-config --variable=includedir openssl)
        export OPENSSL_STATIC OPENSSL_LIB_DIR OPENSSL_INCLUDE_DIR
    fi
else
    features=--no-default-features
    echo "openssl: no libssl to link ($1; Debian: libssl-dev, pkg-config): building without TLS-PSK" >&2
fi
rm -f "$openssl_trial"
