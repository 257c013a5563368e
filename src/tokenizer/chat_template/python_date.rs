//! Python's `strftime` in the C locale, with glibc's flag `-`.

use jiff::civil::DateTime;
use jiff::fmt::strtime;
use minijinja::{Error, ErrorKind};

/// Formats a date without a time zone.
///
/// # Errors
/// For a directive other than `%D`, `%e`, `%F`, `%T` and those in the documentation of Python 3.11.
pub(crate) fn format(format: &str, date: DateTime) -> Result<String, Error> {
    let mut text = String::new();
    let mut remaining = format;
    while let Some(start) = remaining.find('%') {
        text.push_str(&remaining[..start]);
        remaining = &remaining[start..];
        let flag_length = usize::from(remaining[1..].starts_with('-'));
        let Some(letter) = remaining[1 + flag_length..].chars().next() else {
            return Err(unknown(remaining));
        };
        let end = 1 + flag_length + letter.len_utf8();
        let directive = &remaining[..end];
        // jiff's format of the directive.
        let jiff_format = match letter {
            'a' | 'A' | 'b' | 'B' | 'd' | 'e' | 'F' | 'H' | 'I' | 'j' | 'm' | 'M' | 'p' | 'S'
            | 'T' | 'U' | 'w' | 'W' | 'y' | 'Y' | 'G' | 'u' | 'V' | '%' => directive,
            'c' => "%a %b %e %H:%M:%S %Y",
            'x' | 'D' => "%m/%d/%y",
            'X' => "%H:%M:%S",
            'f' => "%6f",
            // Empty for a date without a time zone.
            'z' | 'Z' => "",
            _ => return Err(unknown(directive)),
        };
        let part = strtime::format(jiff_format, date);
        text.push_str(
            &part.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?,
        );
        remaining = &remaining[end..];
    }
    text.push_str(remaining);
    Ok(text)
}

fn unknown(directive: &str) -> Error {
    let message = format!("strftime_now does not support `{directive}`");
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of Python 3.11's `datetime(2026, 3, 1, 5, 7, 9, 12345).strftime`.
    #[test]
    fn dates_are_formatted_as_by_python() {
        let date = DateTime::constant(2026, 3, 1, 5, 7, 9, 12_345_000);
        for (directives, expected) in [
            ("%d %b %Y", "01 Mar 2026"),
            ("%-d. %B %y", "1. March 26"),
            ("%c", "Sun Mar  1 05:07:09 2026"),
            ("%x %X", "03/01/26 05:07:09"),
            ("%H:%M:%S.%f", "05:07:09.012345"),
            ("%I %p %j %U %w %W %a %A", "05 AM 060 09 0 08 Sun Sunday"),
            ("%G-W%V-%u", "2026-W09-7"),
            ("[%z%Z] 100%%", "[] 100%"),
            ("Größe", "Größe"),
        ] {
            assert_eq!(format(directives, date).unwrap(), expected, "{directives}");
        }
        for unknown in ["%q", "%", "%-", "%Q", "%ü"] {
            assert!(format(unknown, date).is_err(), "{unknown}");
        }
    }
}
