//! Fuzz bodies of queues.
