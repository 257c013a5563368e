//! US dollars, in whole picodollars: sums are exact, and never overflow.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An amount of US dollars, in picodollars (10^-12). The largest is 18.4 million dollars, beyond which
/// amounts stay where they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dollars(u64);

const PICO: f64 = 1e12;

impl Dollars {
    pub const ZERO: Dollars = Dollars(0);
    pub const MAX: Dollars = Dollars(u64::MAX);

    /// Rounded up; nothing for what is negative or no number.
    pub fn at_least(usd: f64) -> Dollars {
        // `as` saturates, and makes 0 of NaN. A product that is off in its last bit is no whole picodollar.
        Dollars((usd * PICO - 1e-3).ceil() as u64)
    }

    /// Rounded down; nothing for what is negative or no number.
    pub fn at_most(usd: f64) -> Dollars {
        Dollars((usd * PICO + 1e-3).floor() as u64)
    }

    pub fn usd(self) -> f64 {
        self.0 as f64 / PICO
    }

    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub fn plus(self, other: Dollars) -> Dollars {
        Dollars(self.0.saturating_add(other.0))
    }

    /// Never less than nothing.
    #[must_use]
    pub fn minus(self, other: Dollars) -> Dollars {
        Dollars(self.0.saturating_sub(other.0))
    }

    #[must_use]
    pub fn times(self, factor: f64) -> Dollars {
        Dollars((self.0 as f64 * factor).ceil() as u64)
    }
}

impl fmt::Display for Dollars {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&crate::terminal::format_dollars(self.usd()))
    }
}

impl Serialize for Dollars {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.usd().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Dollars {
    /// # Errors
    /// For a negative amount: an account with one could be spent for ever.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let usd = f64::deserialize(deserializer)?;
        if usd < 0.0 {
            return Err(de::Error::custom(format_args!("a negative amount, {usd}")));
        }
        Ok(Dollars((usd * PICO).round() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_exact_and_stay_within_their_bounds() {
        let tenth = Dollars::at_least(0.1);
        let sum = (0..10).fold(Dollars::ZERO, |sum, _| sum.plus(tenth));
        assert_eq!(sum, Dollars::at_most(1.0));
        assert_eq!(
            (Dollars::at_least(0.0015).usd(), Dollars::at_least(1e-13).0),
            (0.0015, 1)
        );
        assert_eq!(Dollars::at_most(1e-13), Dollars::ZERO);
        assert_eq!(Dollars::at_least(f64::NAN), Dollars::ZERO);
        assert_eq!(Dollars::at_least(-3.0), Dollars::ZERO);
        assert_eq!(Dollars::at_least(1e300).plus(tenth), Dollars::MAX);
        assert_eq!(tenth.minus(sum), Dollars::ZERO);
        assert_eq!(Dollars::MAX.times(2.0), Dollars::MAX);
    }

    #[test]
    fn amounts_survive_a_file_and_negative_ones_are_refused() {
        for usd in [0.0, 1e-12, 0.000_123_456_789, 25.0, 8_999.123_456] {
            let amount = Dollars::at_least(usd);
            let text = serde_json::to_string(&amount).unwrap();
            assert_eq!(serde_json::from_str::<Dollars>(&text).unwrap(), amount);
        }
        assert!(serde_json::from_str::<Dollars>("-5.0").is_err());
        assert!(serde_json::from_str::<Dollars>("null").is_err());
    }
}
