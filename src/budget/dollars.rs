//! [`Dollars`]: amounts with exact sums, which saturate instead of overflowing.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Amount of US dollars, stored as a whole number of picodollars (10^-12 dollars). Amounts saturate at 18.4 million
/// dollars.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dollars(u64);

const PICODOLLARS_PER_DOLLAR: f64 = 1e12;

/// Rounding error of a product of floats in picodollars; an error up to this size does not change a rounded amount.
const TOLERANCE: f64 = 1e-3;

impl Dollars {
    pub const ZERO: Dollars = Dollars(0);
    pub const MAX: Dollars = Dollars(u64::MAX);

    /// Converts from dollars, rounded up; negative numbers and NaN become zero.
    pub fn at_least(usd: f64) -> Dollars {
        // `as` saturates, and converts NaN to 0.
        Dollars((usd * PICODOLLARS_PER_DOLLAR - TOLERANCE).ceil() as u64)
    }

    /// Converts from dollars, rounded down; negative numbers and NaN become zero.
    pub fn at_most(usd: f64) -> Dollars {
        Dollars((usd * PICODOLLARS_PER_DOLLAR + TOLERANCE).floor() as u64)
    }

    /// Converts to dollars.
    pub fn usd(self) -> f64 {
        self.0 as f64 / PICODOLLARS_PER_DOLLAR
    }

    pub(crate) fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Returns the sum, at most [`Dollars::MAX`].
    #[must_use]
    pub fn plus(self, other: Dollars) -> Dollars {
        Dollars(self.0.saturating_add(other.0))
    }

    /// Returns the difference, or zero if `other` is larger.
    #[must_use]
    pub fn minus(self, other: Dollars) -> Dollars {
        Dollars(self.0.saturating_sub(other.0))
    }

    /// Returns the product, rounded up to a picodollar.
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
    /// If the amount is negative: it would raise the budget.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let usd = f64::deserialize(deserializer)?;
        if usd < 0.0 {
            return Err(de::Error::custom(format_args!("negative amount {usd}")));
        }
        Ok(Dollars((usd * PICODOLLARS_PER_DOLLAR).round() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollar_sums_are_exact_and_saturate() {
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
    fn dollars_survive_serialisation_and_negative_amounts_are_refused() {
        for usd in [0.0, 1e-12, 0.000_123_456_789, 25.0, 8_999.123_456] {
            let amount = Dollars::at_least(usd);
            let text = serde_json::to_string(&amount).unwrap();
            assert_eq!(serde_json::from_str::<Dollars>(&text).unwrap(), amount);
        }
        assert!(serde_json::from_str::<Dollars>("-5.0").is_err());
        assert!(serde_json::from_str::<Dollars>("null").is_err());
    }
}
