//! What reaches a terminal.
