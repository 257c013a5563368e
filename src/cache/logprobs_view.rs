//! [`LogprobsView`]: logprobs borrowed from a line, in few allocations.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};

use crate::cache::raw_token::RawToken;
use crate::cache::record::Logprobs;
use crate::cache::stored;

/// [`Logprobs`] of T tokens, with the alternatives of all positions in one allocation and every token as bytes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(from = "StoredLogprobs<'a>", bound(deserialize = "'de: 'a"))]
pub struct LogprobsView<'a> {
    /// Bytes of the emitted tokens (T); empty for a token whose bytes are unknown.
    pub token: Vec<Cow<'a, [u8]>>,
    /// Logprobs of the emitted tokens (T).
    pub logprob: Vec<Option<f32>>,
    /// Bytes of the alternatives at each position (T x up to k).
    pub top: FlatLists<Cow<'a, [u8]>>,
    /// Logprobs of the alternatives (the shape of `top`).
    pub top_logprob: FlatLists<Option<f32>>,
}

impl<'a> From<&'a Logprobs> for LogprobsView<'a> {
    fn from(logprobs: &'a Logprobs) -> Self {
        let bytes = |token: &'a String| Cow::Borrowed(token.as_bytes());
        let mut view = Self {
            token: logprobs.token.iter().map(bytes).collect(),
            logprob: logprobs.logprob.clone(),
            top: FlatLists::from_lists(&logprobs.top, bytes),
            top_logprob: FlatLists::from_lists(&logprobs.top_logprob, |&logprob| logprob),
        };
        view.insert_raw_tokens(&logprobs.raw);
        view
    }
}

impl<'a> LogprobsView<'a> {
    /// Copies the borrowed tokens, so that the view does not depend on its line.
    pub fn into_owned(self) -> LogprobsView<'static> {
        let owned = |tokens: Vec<Cow<'a, [u8]>>| -> Vec<Cow<'static, [u8]>> {
            let tokens = tokens.into_iter();
            tokens.map(|token| Cow::Owned(token.into_owned())).collect()
        };
        LogprobsView {
            token: owned(self.token),
            logprob: self.logprob,
            top: FlatLists {
                values: owned(self.top.values),
                ends: self.top.ends,
            },
            top_logprob: self.top_logprob,
        }
    }

    /// Returns a copy with the bytes of each token replaced by `new_bytes`; a token for which it returns `None` is
    /// unchanged.
    pub(crate) fn map_tokens(
        &self,
        new_bytes: impl Fn(&[u8]) -> Option<Vec<u8>>,
    ) -> LogprobsView<'a> {
        let map =
            |bytes: &Cow<'a, [u8]>| new_bytes(bytes).map_or_else(|| bytes.clone(), Cow::Owned);
        LogprobsView {
            token: self.token.iter().map(map).collect(),
            logprob: self.logprob.clone(),
            top: FlatLists {
                values: self.top.values.iter().map(map).collect(),
                ends: self.top.ends.clone(),
            },
            top_logprob: self.top_logprob.clone(),
        }
    }

    /// Inserts the bytes of the tokens that are not UTF-8, which are stored as empty texts. A position or rank that
    /// does not exist is ignored.
    pub(crate) fn insert_raw_tokens(&mut self, raw: &[RawToken]) {
        for token in raw {
            let position = token.position as usize;
            let slot = match usize::try_from(token.rank) {
                Err(_) => self.token.get_mut(position),
                Ok(rank) => {
                    let range = self.top.range(position);
                    self.top.values[range].get_mut(rank)
                }
            };
            if let (Some(slot), Some(bytes)) = (slot, token.bytes())
                && slot.is_empty()
            {
                *slot = Cow::Owned(bytes);
            }
        }
    }
}

impl<'a> From<StoredLogprobs<'a>> for LogprobsView<'a> {
    fn from(stored: StoredLogprobs<'a>) -> Self {
        // `collect` reuses the allocation of `tokens`.
        let bytes =
            |tokens: Vec<StringBytes<'a>>| tokens.into_iter().map(|token| token.0).collect();
        let mut view = Self {
            token: bytes(stored.token),
            logprob: stored.logprob,
            top: FlatLists {
                values: bytes(stored.top.values),
                ends: stored.top.ends,
            },
            top_logprob: stored.top_logprob,
        };
        view.insert_raw_tokens(&stored.raw);
        view
    }
}

/// List of lists, with the values of all lists in one allocation.
#[derive(Debug, Clone, PartialEq)]
pub struct FlatLists<T> {
    values: Vec<T>,
    /// Index in `values` after the last value of each list.
    ends: Vec<usize>,
}

impl<T> Default for FlatLists<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            ends: Vec::new(),
        }
    }
}

impl<T> FlatLists<T> {
    /// Returns the range in `values` of the list at `index`; an empty range if there is no such list.
    fn range(&self, index: usize) -> Range<usize> {
        match (index.checked_sub(1), self.ends.get(index)) {
            (_, None) => 0..0,
            (None, Some(&end)) => 0..end,
            (Some(previous), Some(&end)) => self.ends[previous]..end,
        }
    }

    /// Returns the list at `index`; an empty list if there is no such list.
    pub fn get(&self, index: usize) -> &[T] {
        &self.values[self.range(index)]
    }

    /// Number of lists.
    pub fn lists(&self) -> usize {
        self.ends.len()
    }

    /// Number of values in all lists.
    pub fn total(&self) -> usize {
        self.values.len()
    }

    /// Reserves memory for `values` more values and `lists` more lists.
    pub fn reserve(&mut self, values: usize, lists: usize) {
        self.values.reserve(values);
        self.ends.reserve(lists);
    }

    /// Appends a value to the current list.
    pub fn push(&mut self, value: T) {
        self.values.push(value);
    }

    /// Ends the current list; the next value starts a new list.
    pub fn end(&mut self) {
        self.ends.push(self.values.len());
    }

    fn from_lists<'a, U: 'a>(
        lists: impl IntoIterator<Item = &'a Vec<U>>,
        value: impl Fn(&'a U) -> T,
    ) -> Self {
        let mut flat = Self::default();
        for list in lists {
            flat.values.extend(list.iter().map(&value));
            flat.end();
        }
        flat
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for FlatLists<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListsVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ListsVisitor<T> {
            type Value = FlatLists<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of lists")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut lists: A) -> Result<FlatLists<T>, A::Error> {
                let mut flat = FlatLists::default();
                while lists
                    .next_element_seed(ListVisitor(&mut flat.values))?
                    .is_some()
                {
                    flat.end();
                }
                Ok(flat)
            }
        }

        deserializer.deserialize_seq(ListsVisitor(PhantomData))
    }
}

/// Fields of [`Logprobs`] as stored in a line.
#[derive(Deserialize)]
struct StoredLogprobs<'a> {
    #[serde(borrow)]
    token: Vec<StringBytes<'a>>,
    logprob: Vec<Option<f32>>,
    #[serde(borrow)]
    top: FlatLists<StringBytes<'a>>,
    top_logprob: FlatLists<Option<f32>>,
    #[serde(with = "stored::raw")]
    raw: Vec<RawToken>,
}

/// Bytes of a JSON string; borrowed unless it has escapes.
struct StringBytes<'a>(Cow<'a, [u8]>);

impl<'de: 'a, 'a> Deserialize<'de> for StringBytes<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringVisitor;

        impl<'de> Visitor<'de> for StringVisitor {
            type Value = Cow<'de, [u8]>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text.as_bytes()))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.as_bytes().to_vec()))
            }
        }

        deserializer.deserialize_str(StringVisitor).map(StringBytes)
    }
}

/// Deserialises one list by appending its values to the vector.
struct ListVisitor<'v, T>(&'v mut Vec<T>);

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for ListVisitor<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for ListVisitor<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        while let Some(value) = values.next_element()? {
            self.0.push(value);
        }
        Ok(())
    }
}
