//! JSON in the format of Python's `json.dumps`, which chat templates expect.

use std::io::{self, Write};

use minijinja::value::{ArgType, Kwargs, from_args};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::Formatter;

/// Maximum indent, which limits the size of the result.
const MAX_INDENT: usize = 16;

/// Filter `tojson(value, ensure_ascii=False, indent=None, separators=None, *, sort_keys=False)`, with the output of
/// `transformers`. Unlike there, `sort_keys` must be named, and the indent is at most [`MAX_INDENT`].
pub(crate) fn tojson(args: &[Value]) -> Result<Value, Error> {
    type Arguments<'a> = (
        &'a Value,
        Option<Value>,
        Option<usize>,
        Option<Vec<String>>,
        Kwargs,
    );
    let (value, ensure_ascii, indent, separators, named): Arguments = from_args(args)?;
    let ensure_ascii = argument(ensure_ascii, &named, "ensure_ascii")?;
    let indent = argument(indent, &named, "indent")?;
    let separators = argument(separators, &named, "separators")?;
    let sort_keys: Option<bool> = named.get("sort_keys")?;
    named.assert_all_used()?;
    if indent.is_some_and(|width| width > MAX_INDENT) {
        return Err(invalid(&format!(
            "tojson supports an indent of at most {MAX_INDENT} spaces"
        )));
    }
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson needs two separators")),
        None => (
            if indent.is_some() { "," } else { ", " }.into(),
            ": ".into(),
        ),
    };
    let mut python = PythonFormatter {
        item_separator,
        key_separator,
        indent,
        depth: 0,
        is_empty: true,
        ensure_ascii: ensure_ascii.is_some_and(|value: Value| value.is_true()),
    };
    let mut json = serde_json::to_value(value).map_err(|e| invalid(&e.to_string()))?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    json.serialize(&mut serde_json::Serializer::with_formatter(
        &mut out,
        &mut python,
    ))
    .map_err(|e| invalid(&e.to_string()))?;
    let text = String::from_utf8(out).map_err(|e| invalid(&e.to_string()))?;
    Ok(Value::from(text))
}

/// Returns the value of an argument that may be given by position or by name.
fn argument<'a, T>(
    positional: Option<T>,
    named: &'a Kwargs,
    name: &'a str,
) -> Result<Option<T>, Error>
where
    Option<T>: ArgType<'a, Output = Option<T>>,
{
    match positional {
        Some(value) => Ok(Some(value)),
        None => named.get(name),
    }
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

/// Formats JSON like `json.dumps`.
struct PythonFormatter {
    /// Separator between items.
    item_separator: String,
    /// Separator between a key and its value.
    key_separator: String,
    /// Number of spaces per level. None: everything in one line.
    indent: Option<usize>,
    /// Number of open containers.
    depth: usize,
    /// True if the innermost container has no items yet.
    is_empty: bool,
    ensure_ascii: bool,
}

impl PythonFormatter {
    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.new_line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item_separator.as_bytes())?;
        }
        self.is_empty = false;
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
}

impl Formatter for &mut PythonFormatter {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }
    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }
    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key_separator.as_bytes())
    }

    /// Python writes the exponent of a float with a sign and at least two digits.
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        let text = format!("{value:?}");
        match text.split_once('e') {
            Some((digits, exponent)) => {
                let (sign, exponent) = match exponent.strip_prefix('-') {
                    Some(exponent) => ('-', exponent),
                    None => ('+', exponent),
                };
                write!(writer, "{digits}e{sign}{exponent:0>2}")
            }
            None => writer.write_all(text.as_bytes()),
        }
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ensure_ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for unit in fragment.encode_utf16() {
            match u8::try_from(unit) {
                // Python escapes the control character DEL as well.
                Ok(byte) if byte < 0x7f => writer.write_all(&[byte])?,
                _ => write!(writer, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_those_of_transformers() {
        let named =
            |name: &'static str, value: Value| Value::from(Kwargs::from_iter([(name, value)]));
        let (plain, ascii) = ("[\"\u{e9}\u{7f}\"]", "[\"\\u00e9\\u007f\"]");
        let indented = "[\n \"\u{e9}\u{7f}\"\n]";
        for (arguments, expected) in [
            (vec![], plain),
            (vec![Value::from(true)], ascii),
            (vec![named("ensure_ascii", Value::from(true))], ascii),
            (vec![Value::from(false), Value::from(1)], indented),
            (vec![named("indent", Value::from(1))], indented),
        ] {
            let value = Value::from(vec!["\u{e9}\u{7f}"]);
            let arguments = [vec![value], arguments].concat();
            let json = tojson(&arguments).unwrap().to_string();
            assert_eq!(json, expected, "{arguments:?}");
        }
        assert!(tojson(&[Value::from(1), named("width", Value::from(3))]).is_err());
    }
}
