//! Prompts in, recorded answers out.
