//! Conditions on settings.

use super::error::Mistake;

/// Returns a mistake unless `is_valid`; its message is the name of the key, followed by `problem`.
pub(super) fn check(is_valid: bool, key: &'static str, problem: &str) -> Result<(), Mistake> {
    check_with(is_valid, key, || format!("`{key}` {problem}"))
}

/// Returns a mistake with this message unless `is_valid`.
pub(super) fn check_with(
    is_valid: bool,
    key: &'static str,
    message: impl FnOnce() -> String,
) -> Result<(), Mistake> {
    if is_valid {
        Ok(())
    } else {
        Err(Mistake::new(key, message()))
    }
}
