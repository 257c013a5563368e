//! Text for terminals: sanitising, number formats, tables and progress.
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | `sanitise` and `escape_unsafe`; formats of durations, counts, dollars and bytes; tables |
//! | `progress.rs` | progress bars and lines on stderr |
//!
//! Invariant: text from a model, an endpoint or a data file reaches a terminal only through [`sanitise`] (or, as
//! JSON, through `escape_unsafe`).

pub(crate) mod progress;

pub use progress::{Progress, ReadProgress};

use std::borrow::Cow;
use std::fmt::Write;
use std::time::Duration;

/// Makes text from a model, an endpoint or a data file safe to print.
///
/// Control characters (including escape sequences and C1), line and paragraph separators, and characters that change
/// the display order are replaced by visible escapes. Line feeds and tabs are kept.
pub fn sanitise(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for char in text.chars() {
        if is_unsafe(char) {
            safe.extend(char.escape_unicode());
        } else {
            safe.push(char);
        }
    }
    Cow::Owned(safe)
}

/// Returns the arguments of a command with a space before them, to append to the command; empty if there are none.
pub(crate) fn after_space(arguments: &str) -> String {
    if arguments.is_empty() {
        String::new()
    } else {
        format!(" {arguments}")
    }
}

/// Escapes the characters that [`sanitise`] replaces, as JSON escapes: the text stays JSON with the same value.
pub(crate) fn escape_unsafe(json: &str) -> Cow<'_, str> {
    if !json.chars().any(is_unsafe) {
        return Cow::Borrowed(json);
    }
    let mut safe = String::with_capacity(json.len() + 16);
    for char in json.chars() {
        if is_unsafe(char) {
            let mut units = [0; 2];
            for unit in char.encode_utf16(&mut units) {
                safe.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            safe.push(char);
        }
    }
    Cow::Owned(safe)
}

/// Returns true if [`sanitise`] replaces the character.
fn is_unsafe(char: char) -> bool {
    match char {
        '\n' | '\t' => false,
        // Characters that change the text direction; line and paragraph separators.
        '\u{061c}'
        | '\u{200e}'
        | '\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}' => true,
        _ => char.is_control(),
    }
}

/// Formats a duration in at most two units: `2 d 2 h`, `2 h 5 min`, `3 min 20 s`, `4.2 s`, `120 ms`.
pub(crate) fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

/// Formats a number with thousands separators: `12,345`.
pub(crate) fn format_count(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Formats US dollars: with 4 decimals between 0 and 1 dollar, else with 2.
pub(crate) fn format_dollars(dollars: f64) -> String {
    if dollars >= 1.0 || dollars == 0.0 {
        format!("${dollars:.2}")
    } else {
        format!("${dollars:.4}")
    }
}

/// Formats a size in decimal units: `12.0 MB`.
pub(crate) fn format_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1_000.0 {
            return match unit {
                "B" => format!("{bytes} B"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1_000.0;
    }
    format!("{value:.1} TB")
}

/// Formats `part / total` in per cent: `12.5 %`; a total of 0 counts as 1.
pub(crate) fn format_share(part: u64, total: u64) -> String {
    format!("{:.1} %", 100.0 * part as f64 / total.max(1) as f64)
}

/// Formats rows as a table: the first column left-aligned, the others right-aligned.
pub fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut widths = [0; COLUMNS];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Writing to a string cannot fail.
            let _ = match column {
                0 => write!(line, "{cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sanitise_escapes_only_control_and_direction_characters() {
        let cases = [
            (
                "plain text,\n\ttab, ä 日本 🦀",
                "plain text,\n\ttab, ä 日本 🦀",
            ),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("a\rb\u{8}\u{7f}", "a\\u{d}b\\u{8}\\u{7f}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("\u{202e}gnp.exe\u{2066}", "\\u{202e}gnp.exe\\u{2066}"),
        ];
        for (text, expected) in cases {
            assert_eq!(sanitise(text), expected);
        }
        assert!(matches!(sanitise("plain"), Cow::Borrowed(_)));
    }

    #[test]
    fn durations_counts_and_dollars_are_formatted() {
        let cases = [
            (0.12, "120 ms"),
            (4.24, "4.2 s"),
            (200.0, "3 min 20 s"),
            (7_500.0, "2 h 5 min"),
            (180_000.0, "2 d 2 h"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(format_duration(Duration::from_secs_f64(seconds)), expected);
        }
        for (count, expected) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (12_345_678, "12,345,678"),
        ] {
            assert_eq!(format_count(count), expected);
        }
        for (dollars, expected) in [(0.0, "$0.00"), (0.0123, "$0.0123"), (12.3456, "$12.35")] {
            assert_eq!(format_dollars(dollars), expected);
        }
    }

    #[test]
    fn table_columns_are_aligned() {
        let rows = [["ok", "1,200"], ["failed", "3"]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), "ok      1,200\nfailed      3\n");
    }
}
