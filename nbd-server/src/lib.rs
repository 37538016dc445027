//! Network block devices: protocol, server, client and the kernel's devices.
