//! Servers that are made up for the occasion: right ones, and every way of being wrong.

mod fake;
mod malformed;
mod traffic;
