//! Fast parser for logprobs in exactly the form that this version writes.
//!
//! A general JSON parser would take half of the time of preparing a cache. This one returns `None` for any other
//! form, and the caller falls back to the general parser.

use std::borrow::Cow;

use super::stored;
use crate::cache::logprobs_view::{FlatLists, LogprobsView};

/// Number of alternatives to reserve memory for: the most that endpoints offer.
const USUAL_TOP: usize = 20;

/// Parses `text`, which starts after the opening brace of the logprobs. Returns the logprobs, and the rest of
/// the text from the field after `raw`.
pub(crate) fn parse(text: &str) -> Option<(LogprobsView<'_>, &str)> {
    let mut scan = ColumnScanner { text, at: 0 };
    let mut view = LogprobsView::default();
    scan.literal("\"token\":")?;
    scan.list(ColumnScanner::string, |token| view.token.push(token))?;
    let tokens = view.token.len();
    view.logprob.reserve(tokens);
    view.top.reserve(USUAL_TOP * tokens, tokens);
    view.top_logprob.reserve(USUAL_TOP * tokens, tokens);
    scan.literal(",\"logprob\":")?;
    scan.list(ColumnScanner::logprob, |logprob| view.logprob.push(logprob))?;
    scan.literal(",\"top\":")?;
    scan.lists(&mut view.top, ColumnScanner::string)?;
    scan.literal(",\"top_logprob\":")?;
    scan.lists(&mut view.top_logprob, ColumnScanner::logprob)?;
    scan.literal(",\"raw\":")?;
    let raw = scan.string()?;
    view.put_raw(&stored::raw::tokens(std::str::from_utf8(&raw).ok()?).ok()?);
    Some((view, &text[scan.at..]))
}

struct ColumnScanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> ColumnScanner<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.at..]
    }

    fn literal(&mut self, expected: &str) -> Option<()> {
        let is_next = self.rest().starts_with(expected.as_bytes());
        self.at += expected.len();
        is_next.then_some(())
    }

    /// Skips `byte` if it comes next.
    fn skip(&mut self, byte: u8) -> bool {
        let is_next = self.rest().first() == Some(&byte);
        self.at += usize::from(is_next);
        is_next
    }

    fn list<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Option<T>,
        mut put: impl FnMut(T),
    ) -> Option<()> {
        self.literal("[")?;
        if self.skip(b']') {
            return Some(());
        }
        loop {
            put(item(self)?);
            if !self.skip(b',') {
                return self.literal("]");
            }
        }
    }

    fn lists<T>(&mut self, to: &mut FlatLists<T>, item: fn(&mut Self) -> Option<T>) -> Option<()> {
        let list = |scan: &mut Self| {
            scan.list(item, |value| to.push(value))?;
            to.end();
            Some(())
        };
        self.list(list, drop)
    }

    /// Parses a string and returns its bytes.
    fn string(&mut self) -> Option<Cow<'a, [u8]>> {
        self.literal("\"")?;
        let rest = self.rest();
        let end = rest.iter().position(|&byte| matches!(byte, b'"' | b'\\'))?;
        if rest[end] == b'"' {
            self.at += end + 1;
            return Some(Cow::Borrowed(&rest[..end]));
        }
        let mut end = end;
        while *rest.get(end)? != b'"' {
            end += if rest[end] == b'\\' { 2 } else { 1 };
        }
        let quoted = self.text.get(self.at - 1..=self.at + end)?;
        self.at += end + 1;
        let text: String = serde_json::from_str(quoted).ok()?;
        Some(Cow::Owned(text.into_bytes()))
    }

    /// Parses a number or null.
    fn logprob(&mut self) -> Option<Option<f32>> {
        if self.rest().first() == Some(&b'n') {
            self.literal("null")?;
            return Some(None);
        }
        let (value, length) = number(self.rest())?;
        self.at += length;
        Some(Some(value))
    }
}

/// Parses the number at the start of `text`. Returns the nearest f32 and the length of the number in bytes.
///
/// A significand below 2^53 divided by a power of ten that a f64 holds exactly is rounded once, by the division
/// (Clinger, "How to Read Floating Point Numbers Accurately", 1990). Rounding the quotient again, to f32, differs
/// from rounding once only if the quotient lies exactly in the middle between two f32.
fn number(text: &[u8]) -> Option<(f32, usize)> {
    let is_negative = text.first() == Some(&b'-');
    let mut at = usize::from(is_negative);
    let (mut digits, mut places) = (0u64, 0);
    let start = at;
    let mut point = None;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'0'..=b'9' => digits = digits.wrapping_mul(10).wrapping_add(u64::from(byte - b'0')),
            b'.' if point.is_none() => point = Some(at),
            _ => break,
        }
        at += 1;
    }
    let count = at - start - usize::from(point.is_some());
    if let Some(point) = point {
        places = at - point - 1;
    }
    let is_plain = !matches!(text.get(at), Some(b'e' | b'E' | b'+' | b'-'));
    // 15 digits are less than 2^53.
    if is_plain && (1..=15).contains(&count) {
        let value = digits as f64 / POWERS[places];
        let is_middle = value.to_bits() & 0x1fff_ffff == 0x1000_0000;
        let is_normal = value == 0.0 || value > f64::from(f32::MIN_POSITIVE);
        if !is_middle && is_normal {
            let value = value as f32;
            return Some((if is_negative { -value } else { value }, at));
        }
    }
    let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
    let length = text.iter().position(|byte| !is_part(byte))?;
    let value = std::str::from_utf8(&text[..length]).ok()?.parse().ok()?;
    Some((value, length))
}

/// Powers of ten. A f64 holds them exactly up to the 22nd.
const POWERS: [f64; 16] = [
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
            // The middle between two f32, and its neighbours.
            let middle = f64::from_bits(f64::from(random.f32()).to_bits() | 0x1000_0000);
            texts.extend([-1, 0, 1].map(|ulp| {
                format!(
                    "{:.14}",
                    f64::from_bits(middle.to_bits().wrapping_add_signed(ulp))
                )
            }));
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
