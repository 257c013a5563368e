//! Fast parser for logprobs in exactly the form that this version writes.
//!
//! With a general JSON parser, parsing logprobs would take half of the time of preparing a cache for training. This
//! parser returns `None` for any other form, and the caller falls back to the general parser.

use std::borrow::Cow;

use super::stored;
use crate::cache::logprobs_view::{FlatLists, LogprobsView};

/// Number of alternatives per token for which memory is reserved: the maximum of `top_logprobs` in OpenAI's API.
const RESERVED_ALTERNATIVES: usize = 20;

/// Parses `text`, which starts after the opening brace of the logprobs. Returns the logprobs, and the text that
/// follows the field `raw`.
pub(crate) fn parse(text: &str) -> Option<(LogprobsView<'_>, &str)> {
    let mut scan = ColumnScanner { text, position: 0 };
    let mut view = LogprobsView::default();
    scan.literal("\"token\":")?;
    scan.list(ColumnScanner::string, |token| view.token.push(token))?;
    let tokens = view.token.len();
    view.logprob.reserve(tokens);
    view.top.reserve(RESERVED_ALTERNATIVES * tokens, tokens);
    view.top_logprob
        .reserve(RESERVED_ALTERNATIVES * tokens, tokens);
    scan.literal(",\"logprob\":")?;
    scan.list(ColumnScanner::logprob, |logprob| view.logprob.push(logprob))?;
    scan.literal(",\"top\":")?;
    scan.lists(&mut view.top, ColumnScanner::string)?;
    scan.literal(",\"top_logprob\":")?;
    scan.lists(&mut view.top_logprob, ColumnScanner::logprob)?;
    scan.literal(",\"raw\":")?;
    let raw = scan.string()?;
    view.insert_raw_tokens(&stored::raw::tokens(std::str::from_utf8(&raw).ok()?).ok()?);
    Some((view, &text[scan.position..]))
}

/// Cursor over JSON text. After a method has returned `None`, the position is unspecified.
struct ColumnScanner<'a> {
    text: &'a str,
    /// Offset of the next byte in `text`.
    position: usize,
}

impl<'a> ColumnScanner<'a> {
    fn remaining(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.position..]
    }

    /// Consumes `expected`; `None` if other text comes next.
    fn literal(&mut self, expected: &str) -> Option<()> {
        let is_next = self.remaining().starts_with(expected.as_bytes());
        self.position += expected.len();
        is_next.then_some(())
    }

    /// Consumes `byte` if it comes next. Returns true if it did.
    fn skip(&mut self, byte: u8) -> bool {
        let is_next = self.remaining().first() == Some(&byte);
        self.position += usize::from(is_next);
        is_next
    }

    /// Parses a list: `parse_item` parses each item, and `on_item` receives it.
    fn list<T>(
        &mut self,
        mut parse_item: impl FnMut(&mut Self) -> Option<T>,
        mut on_item: impl FnMut(T),
    ) -> Option<()> {
        self.literal("[")?;
        if self.skip(b']') {
            return Some(());
        }
        loop {
            on_item(parse_item(self)?);
            if !self.skip(b',') {
                return self.literal("]");
            }
        }
    }

    /// Parses a list of lists and appends it to `lists`.
    fn lists<T>(
        &mut self,
        lists: &mut FlatLists<T>,
        parse_item: fn(&mut Self) -> Option<T>,
    ) -> Option<()> {
        let parse_list = |scan: &mut Self| {
            scan.list(parse_item, |value| lists.push(value))?;
            lists.end();
            Some(())
        };
        self.list(parse_list, drop)
    }

    /// Parses a string and returns its bytes; they are borrowed unless the string has escapes.
    fn string(&mut self) -> Option<Cow<'a, [u8]>> {
        self.literal("\"")?;
        let remaining = self.remaining();
        let mut end = remaining
            .iter()
            .position(|&byte| matches!(byte, b'"' | b'\\'))?;
        if remaining[end] == b'"' {
            self.position += end + 1;
            return Some(Cow::Borrowed(&remaining[..end]));
        }
        while *remaining.get(end)? != b'"' {
            end += if remaining[end] == b'\\' { 2 } else { 1 };
        }
        let quoted = self.text.get(self.position - 1..=self.position + end)?;
        self.position += end + 1;
        let text: String = serde_json::from_str(quoted).ok()?;
        Some(Cow::Owned(text.into_bytes()))
    }

    /// Parses a number or null.
    fn logprob(&mut self) -> Option<Option<f32>> {
        if self.remaining().first() == Some(&b'n') {
            self.literal("null")?;
            return Some(None);
        }
        let (value, length) = number(self.remaining())?;
        self.position += length;
        Some(Some(value))
    }
}

/// Number of decimal digits up to which every integer is below 2^53, so that an f64 holds it exactly.
const MAX_EXACT_DIGITS: usize = 15;

/// Mask of the 29 significand bits of an f64 that an f32 does not have.
const EXTRA_BITS: u64 = (1 << 29) - 1;

/// The extra bits of an f64 that lies exactly in the middle between two f32.
const MIDDLE_BITS: u64 = 1 << 28;

/// Parses the number at the start of `text`. Returns the nearest f32 and the length of the number in bytes.
///
/// The quotient of a significand below 2^53 and a power of ten that an f64 holds exactly is rounded once, by the
/// division (Clinger, "How to Read Floating Point Numbers Accurately", 1990). Rounding the quotient again, to f32,
/// differs from rounding once only if the quotient lies exactly in the middle between two f32. In this case, and for
/// other forms of numbers, the standard library parses the text.
fn number(text: &[u8]) -> Option<(f32, usize)> {
    let is_negative = text.first() == Some(&b'-');
    let start = usize::from(is_negative);
    let mut end = start;
    let mut significand = 0u64;
    let mut point = None;
    while let Some(&byte) = text.get(end) {
        match byte {
            // More than MAX_EXACT_DIGITS digits may wrap; such a significand is not used.
            b'0'..=b'9' => {
                significand = significand
                    .wrapping_mul(10)
                    .wrapping_add(u64::from(byte - b'0'));
            }
            b'.' if point.is_none() => point = Some(end),
            _ => break,
        }
        end += 1;
    }
    let digits = end - start - usize::from(point.is_some());
    let decimal_places = point.map_or(0, |point| end - point - 1);
    let has_exponent = matches!(text.get(end), Some(b'e' | b'E' | b'+' | b'-'));
    if !has_exponent && (1..=MAX_EXACT_DIGITS).contains(&digits) {
        let value = significand as f64 / POWERS_OF_TEN[decimal_places];
        let is_middle = value.to_bits() & EXTRA_BITS == MIDDLE_BITS;
        // Subnormal f32 have fewer significand bits than the mask assumes.
        let is_normal = value == 0.0 || value > f64::from(f32::MIN_POSITIVE);
        if !is_middle && is_normal {
            let value = value as f32;
            return Some((if is_negative { -value } else { value }, end));
        }
    }
    let is_number_byte = |byte: &u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
    let length = text.iter().position(|byte| !is_number_byte(byte))?;
    let value = std::str::from_utf8(&text[..length]).ok()?.parse().ok()?;
    Some((value, length))
}

/// Powers of ten up to [`MAX_EXACT_DIGITS`]. An f64 holds each power up to 10^22 exactly.
const POWERS_OF_TEN: [f64; MAX_EXACT_DIGITS + 1] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_parse_as_in_the_standard_library() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut texts: Vec<String> = [
            "0.0",
            "-0.0",
            "0",
            "-1",
            "1e-7",
            "-1.5E+3",
            "123456789012345678",
        ]
        .map(String::from)
        .to_vec();
        for _ in 0..200_000 {
            let value = f32::from_bits(random.u32(..));
            if value.is_finite() {
                texts.push(value.to_string());
                texts.push(serde_json::to_string(&value).unwrap());
            }
            texts.push((-20.0 * random.f32().powi(3)).to_string());
            // The middle between two f32, and the nearest f64 on either side.
            let middle = f64::from_bits(f64::from(random.f32()).to_bits() | MIDDLE_BITS);
            texts.extend([-1, 0, 1].map(|ulp| {
                format!(
                    "{:.14}",
                    f64::from_bits(middle.to_bits().wrapping_add_signed(ulp))
                )
            }));
            // Odd integers above 2^24 lie in the middle between two f32.
            texts.push(format!("{}.0", 16_777_217 + 2 * random.u32(..1 << 23)));
        }
        for text in texts {
            let expected: f32 = text.parse().unwrap();
            let (value, length) = number(format!("{text},").as_bytes()).unwrap();
            assert_eq!(
                (value.to_bits(), length),
                (expected.to_bits(), text.len()),
                "{text}"
            );
        }
    }
}
