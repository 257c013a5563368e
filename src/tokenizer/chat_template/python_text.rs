//! Methods of Python's strings that the template engine lacks.

use minijinja::value::from_args;
use minijinja::{Error, ErrorKind, Value};

/// Calls a string method. Returns None for other values and methods.
pub(crate) fn call(value: &Value, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let text = value.as_str()?;
    let result = match method {
        "index" => index(text, args),
        "partition" => partition(text, args, [text, "", ""], |text, part| text.find(part)),
        "rpartition" => partition(text, args, ["", "", text], |text, part| text.rfind(part)),
        "removeprefix" => one(args).map(|start| text.strip_prefix(start).unwrap_or(text).into()),
        "removesuffix" => one(args).map(|end| text.strip_suffix(end).unwrap_or(text).into()),
        "rsplit" => rsplit(text, args),
        "swapcase" => {
            from_args::<()>(args).map(|()| text.chars().flat_map(swap).collect::<String>().into())
        }
        _ => return None,
    };
    Some(result)
}

fn one(args: &[Value]) -> Result<&str, Error> {
    let (text,): (&str,) = from_args(args)?;
    Ok(text)
}

fn error(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn index(text: &str, args: &[Value]) -> Result<Value, Error> {
    let at = text.find(one(args)?);
    let at = at.ok_or_else(|| error("substring not found"))?;
    Ok(text[..at].chars().count().into())
}

/// Splits a text into the part before the separator, the separator, and the part after it. Returns `without` if there is
/// no separator.
fn partition(
    text: &str,
    args: &[Value],
    without: [&str; 3],
    find: impl Fn(&str, &str) -> Option<usize>,
) -> Result<Value, Error> {
    let separator = one(args)?;
    if separator.is_empty() {
        return Err(error("empty separator"));
    }
    let parts = match find(text, separator) {
        Some(at) => [&text[..at], separator, &text[at + separator.len()..]],
        None => without,
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
    let most =
        usize::try_from(most.unwrap_or(-1)).map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(error("empty separator")),
        Some(separator) => text.rsplitn(most, separator).collect(),
        None if most == usize::MAX => text.split_whitespace().rev().collect(),
        None => return Err(error("`rsplit` needs a separator here")),
    };
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

fn swap(letter: char) -> Vec<char> {
    if letter.is_uppercase() {
        letter.to_lowercase().collect()
    } else {
        letter.to_uppercase().collect()
    }
}
