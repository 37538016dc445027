//! Fuzz bodies of configuration space.
