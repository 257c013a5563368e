//! Counts by the kind of text that a token spells.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Positions of a kind, and how many of them were hit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Class {
    pub positions: u64,
    pub hits: u64,
}

/// A [`Class`] for each kind of token. What a token is, its first character other than white space
/// decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classes {
    pub letters: Class,
    pub digits: Class,
    pub punctuation: Class,
    /// White space alone.
    pub space: Class,
    /// Chinese, Japanese and Korean.
    pub cjk: Class,
    /// Everything else: symbols, parts of a character.
    pub other: Class,
}

impl Classes {
    /// Counts a token that is spelled `bytes`.
    pub fn count(&mut self, bytes: &[u8], hit: bool) {
        let class = self.class_of(bytes);
        class.positions += 1;
        class.hits += u64::from(hit);
    }

    fn class_of(&mut self, bytes: &[u8]) -> &mut Class {
        let Ok(text) = std::str::from_utf8(bytes) else {
            return &mut self.other;
        };
        match text.trim_start().chars().next() {
            None => &mut self.space,
            Some(c) if is_cjk(c) => &mut self.cjk,
            Some(c) if c.is_alphabetic() => &mut self.letters,
            Some(c) if c.is_numeric() => &mut self.digits,
            Some(c) if c.is_ascii_punctuation() => &mut self.punctuation,
            Some(_) => &mut self.other,
        }
    }

    fn all(&mut self) -> [&mut Class; 6] {
        let Self {
            letters,
            digits,
            punctuation,
            space,
            cjk,
            other,
        } = self;
        [letters, digits, punctuation, space, cjk, other]
    }

    pub fn add(&mut self, mut other: Self) {
        for (mine, others) in self.all().into_iter().zip(other.all()) {
            mine.positions += others.positions;
            mine.hits += others.hits;
        }
    }
}

impl fmt::Display for Classes {
    /// `letters 91.2 % of 10,000, ...`, without those that did not occur.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counts = *self;
        let names = ["letters", "digits", "punctuation", "space", "CJK", "other"];
        let mut first = true;
        for (name, class) in names.into_iter().zip(counts.all()) {
            if class.positions > 0 {
                let share = 100.0 * class.hits as f64 / class.positions as f64;
                let comma = if first { "" } else { ", " };
                write!(f, "{comma}{name} {share:.1} % of {}", class.positions)?;
                first = false;
            }
        }
        Ok(())
    }
}

/// Ideographs, kana, hangul and the punctuation between them.
fn is_cjk(c: char) -> bool {
    matches!(c,
        '\u{1100}'..='\u{11ff}' | '\u{2e80}'..='\u{303f}' | '\u{3040}'..='\u{30ff}'
        | '\u{3130}'..='\u{318f}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}'
        | '\u{ac00}'..='\u{d7af}' | '\u{f900}'..='\u{faff}' | '\u{ff00}'..='\u{ffef}'
        | '\u{20000}'..='\u{3ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_count_by_what_they_spell() {
        let mut classes = Classes::default();
        for (token, hit) in [
            (" the", true),
            ("Ä", false),
            ("2026", true),
            (" (", true),
            ("\n\n", true),
            ("日本", false),
            ("、", false),
            ("→", false),
        ] {
            classes.count(token.as_bytes(), hit);
        }
        classes.count(b"\xe6\x97", false);
        assert_eq!(
            classes.to_string(),
            "letters 50.0 % of 2, digits 100.0 % of 1, punctuation 100.0 % of 1, \
             space 100.0 % of 1, CJK 0.0 % of 2, other 0.0 % of 2"
        );
        assert_eq!(Classes::default().to_string(), "");
    }
}
