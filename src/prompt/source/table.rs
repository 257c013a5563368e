//! Reads a table with a header: CSV or TSV.
//!
//! Quotes have the meaning of RFC 4180: a double quote at the start of a field opens a quoted field, in which two
//! double quotes stand for one. Like Python's `csv`, this reader accepts a double quote inside an unquoted field as an
//! ordinary character.

use std::collections::{HashSet, VecDeque};
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use csv::{ErrorKind, StringRecord};
use serde_json::{Map, Value};

use crate::prompt::source::rows::{OnRow, usage};

/// Reads a table; every field is a string. Refuses a row with more or fewer fields than the header, and a quoted field
/// that is not closed.
pub(crate) fn read(path: &Path, file: impl Read, delimiter: u8, on_row: OnRow<'_>) -> Result<()> {
    let error_at =
        |line: usize, problem: String| usage(format!("{}:{line}: {problem}", path.display()));
    // The first row is read like the others, so that its line is known too.
    let mut table = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .from_reader(RowTracker::new(file, delimiter));
    // Returns the line of the row, or None at the end of the file.
    let mut read_row = |row: &mut StringRecord| -> Result<Option<usize>> {
        let has_row = table.read_record(row);
        let line = table.get_mut().next_row_line();
        if table.get_ref().is_quote_open_at_end() {
            let problem = "a quoted field in this row is not closed, so it contains the rest of the file: add the closing double quote";
            return Err(error_at(line, problem.into()));
        }
        match has_row {
            Ok(has_row) => Ok(has_row.then_some(line)),
            Err(error) => Err(describe(&error).map_or_else(
                || usage(format!("{}: {error}", path.display())),
                |problem| error_at(line, problem),
            )),
        }
    };

    let mut header = StringRecord::new();
    let Some(header_line) = read_row(&mut header)? else {
        return Ok(());
    };
    check_header(&header).map_err(|problem| error_at(header_line, problem))?;
    let mut row = StringRecord::new();
    while let Some(line) = read_row(&mut row)? {
        let fields = header.iter().zip(&row);
        let fields: Map<String, Value> = fields
            .map(|(name, field)| (name.to_owned(), Value::from(field)))
            .collect();
        on_row(line, Value::Object(fields))?;
    }
    Ok(())
}

/// Describes an error that belongs to one row; returns None for a failure of the file.
fn describe(error: &csv::Error) -> Option<String> {
    match error.kind() {
        ErrorKind::Utf8 { .. } => Some("not valid UTF-8: save the file as UTF-8".into()),
        ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => Some(format!(
            "the header has {expected_len} columns, but this row has {len}: enclose a field that contains the \
             separator, a double quote or a line break in double quotes"
        )),
        _ => None,
    }
}

/// Refuses empty and repeated column names.
fn check_header(header: &StringRecord) -> Result<(), String> {
    let mut names = HashSet::new();
    for (index, name) in header.iter().enumerate() {
        if name.trim().is_empty() {
            let column = index + 1;
            return Err(format!(
                "column {column} of the header has no name: give each column a name"
            ));
        }
        if !names.insert(name) {
            return Err(format!(
                "the header names two columns {name:?}: give each column its own name"
            ));
        }
    }
    Ok(())
}

/// State of the tracker within a row.
#[derive(Clone, Copy, PartialEq)]
enum FieldState {
    /// Before the first byte of a row, where line ends are ignored.
    RowStart,
    FieldStart,
    Unquoted,
    Quoted,
    /// After a double quote in a quoted field: a second one stands for a double quote, anything else closes the field.
    AfterQuote,
}

/// Reader that records the line at which each row starts, and whether a quoted field is open at the end. The `csv`
/// crate reports neither: its line is the line at which the previous row ends, which differs after `\r\n` and blank
/// lines.
struct RowTracker<R> {
    file: R,
    delimiter: u8,
    state: FieldState,
    /// Number of the current line, counted from 1.
    line: usize,
    /// First lines of the rows that were read from the file and not yet taken by [`Self::next_row_line`]. The `csv`
    /// crate reads ahead by one buffer.
    row_lines: VecDeque<usize>,
    is_at_end: bool,
}

impl<R> RowTracker<R> {
    fn new(file: R, delimiter: u8) -> Self {
        RowTracker {
            file,
            delimiter,
            state: FieldState::RowStart,
            line: 1,
            row_lines: VecDeque::new(),
            is_at_end: false,
        }
    }

    /// Returns the line at which the next row starts; at the end of the file, the last line.
    fn next_row_line(&mut self) -> usize {
        self.row_lines.pop_front().unwrap_or(self.line)
    }

    /// Returns true if the whole file was read and its last field lacks its closing quote.
    fn is_quote_open_at_end(&self) -> bool {
        self.is_at_end && self.state == FieldState::Quoted
    }

    /// Updates the state for the next byte, by the rules of the `csv` crate.
    fn advance(&mut self, byte: u8) {
        let is_line_end = matches!(byte, b'\n' | b'\r');
        if self.state == FieldState::RowStart && !is_line_end {
            self.row_lines.push_back(self.line);
            self.state = FieldState::FieldStart;
        }
        self.state = match self.state {
            FieldState::Quoted if byte == b'"' => FieldState::AfterQuote,
            FieldState::Quoted => FieldState::Quoted,
            FieldState::FieldStart | FieldState::AfterQuote if byte == b'"' => FieldState::Quoted,
            _ if is_line_end => FieldState::RowStart,
            _ if byte == self.delimiter => FieldState::FieldStart,
            _ => FieldState::Unquoted,
        };
        self.line += usize::from(byte == b'\n');
    }
}

impl<R: Read> Read for RowTracker<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.is_at_end = count == 0;
        for byte in &buffer[..count] {
            self.advance(*byte);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the line and the field `text` of each row.
    fn rows(csv: &str) -> Result<Vec<(usize, String)>> {
        let mut rows = Vec::new();
        read(
            Path::new("p.csv"),
            csv.as_bytes(),
            b',',
            &mut |line, row| {
                rows.push((line, row["text"].as_str().unwrap().to_owned()));
                Ok(())
            },
        )?;
        Ok(rows)
    }

    #[test]
    fn quote_in_an_unquoted_field_is_an_ordinary_character() {
        let csv = "id,text\n1,5\" pipe\n2,\"a\nb\"\n3,\"x\" y\n";
        let expected = [(2, "5\" pipe"), (3, "a\nb"), (5, "x y")];
        let expected = expected.map(|(line, text)| (line, text.to_owned()));
        assert_eq!(rows(csv).unwrap(), expected);
    }

    #[test]
    fn errors_name_the_line_at_which_the_row_starts() {
        const UNCLOSED: &str = "a quoted field in this row is not closed";
        const UNEQUAL: &str = "the header has 2 columns, but this row has";
        // Longer than the buffer of the `csv` crate.
        let long = "1,\"a\r\nb\"\r\n".repeat(5_000);
        for (csv, line, problem) in [
            ("id,text\n1,5\" pipe\n2,\"a\nb\n", 3, UNCLOSED),
            ("id,text\n1,x\n2,\"cut", 3, UNCLOSED),
            ("text,id\n\"x,1\ny,2\n", 2, UNCLOSED),
            ("id,\"text\n1,x\n", 1, UNCLOSED),
            ("id,text\r\n1,x\r\n2\r\n3,y\r\n", 3, UNEQUAL),
            ("id,text\n\n\n1\n", 4, UNEQUAL),
            ("id,text\n1,\"x\n\ny\"\n2\n", 5, UNEQUAL),
            ("id,text\n1,\"x \"\"y\"\" z\"\n2,x,y\n", 3, UNEQUAL),
            (&format!("id,text\r\n{long}1\r\n"), 10_002, UNEQUAL),
        ] {
            let message = rows(csv).unwrap_err().to_string();
            let expected = format!("p.csv:{line}: {problem}");
            let start: String = csv.chars().take(40).collect();
            assert!(message.contains(&expected), "{start:?}: {message}");
        }
    }
}
