//! Methods of Python's strings that the template engine does not have.

use minijinja::value::from_args;
use minijinja::{Error, ErrorKind, Value};

/// Calls one of these methods on a string. Returns None for other values and other methods.
pub(crate) fn call(value: &Value, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let text = value.as_str()?;
    let result = match method {
        "index" => index(text, args),
        "partition" => partition(text, args, [text, "", ""], |text, part| text.find(part)),
        "rpartition" => partition(text, args, ["", "", text], |text, part| text.rfind(part)),
        "removeprefix" => {
            string_argument(args).map(|start| text.strip_prefix(start).unwrap_or(text).into())
        }
        "removesuffix" => {
            string_argument(args).map(|end| text.strip_suffix(end).unwrap_or(text).into())
        }
        "rsplit" => rsplit(text, args),
        "swapcase" => from_args::<()>(args)
            .map(|()| text.chars().flat_map(swap_case).collect::<String>().into()),
        _ => return None,
    };
    Some(result)
}

fn string_argument(args: &[Value]) -> Result<&str, Error> {
    let (text,): (&str,) = from_args(args)?;
    Ok(text)
}

fn error(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn index(text: &str, args: &[Value]) -> Result<Value, Error> {
    let start = text.find(string_argument(args)?);
    let start = start.ok_or_else(|| error("substring not found"))?;
    Ok(text[..start].chars().count().into())
}

/// Splits a text into the part before the separator, the separator, and the part after it. Returns `not_found` if the
/// text does not contain the separator.
fn partition(
    text: &str,
    args: &[Value],
    not_found: [&str; 3],
    find: impl Fn(&str, &str) -> Option<usize>,
) -> Result<Value, Error> {
    let separator = string_argument(args)?;
    if separator.is_empty() {
        return Err(error("empty separator"));
    }
    let parts = match find(text, separator) {
        Some(start) => [&text[..start], separator, &text[start + separator.len()..]],
        None => not_found,
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, max_splits): (Option<&str>, Option<i64>) = from_args(args)?;
    let max_parts = usize::try_from(max_splits.unwrap_or(-1))
        .map_or(usize::MAX, |splits| splits.saturating_add(1));
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(error("empty separator")),
        Some(separator) => text.rsplitn(max_parts, separator).collect(),
        None if max_parts == usize::MAX => text.split_whitespace().rev().collect(),
        None => return Err(error("`rsplit` with a limit needs a separator")),
    };
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

fn swap_case(letter: char) -> Vec<char> {
    if letter.is_uppercase() {
        letter.to_lowercase().collect()
    } else {
        letter.to_uppercase().collect()
    }
}
