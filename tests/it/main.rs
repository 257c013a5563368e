//! One file per verb or promise.
