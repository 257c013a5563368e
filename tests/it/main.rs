//! One file per verb or promise.

mod gradients;
mod model;
