//! The command line as given.
