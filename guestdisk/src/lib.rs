//! Reads what lies on a guest's disk: partitions, volumes, file systems, boot loader configuration.
