//! TODO

use crate::cache::raw_token::RawToken;
use crate::cache::record::Logprobs;
use crate::cache::stored;
use serde::Deserialize;
use serde::Deserializer;
use serde::de::DeserializeSeed;
use serde::de::SeqAccess;
use serde::de::Visitor;
use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

/// [`Logprobs`] of T tokens without a list per position, and every token by its bytes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(from = "StoredLogprobs<'a>", bound(deserialize = "'de: 'a"))]
pub struct LogprobsView<'a> {
    /// The emitted tokens (T); empty where the bytes are not known.
    pub token: Vec<Cow<'a, [u8]>>,
    /// Their logprobs (T).
    pub logprob: Vec<Option<f32>>,
    /// The alternatives of all positions, and their logprobs.
    pub top: FlatLists<Cow<'a, [u8]>>,
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
        view.put_raw(&logprobs.raw);
        view
    }
}

impl<'a> LogprobsView<'a> {
    /// Maps the bytes of all tokens; those for which `of` returns None are kept.
    pub fn map_tokens(&self, of: impl Fn(&[u8]) -> Option<Vec<u8>>) -> LogprobsView<'a> {
        let map = |bytes: &Cow<'a, [u8]>| of(bytes).map_or_else(|| bytes.clone(), Cow::Owned);
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

    /// Puts the tokens that are no UTF-8 where an empty text holds their place.
    pub fn put_raw(&mut self, raw: &[RawToken]) {
        for token in raw {
            let position = token.position as usize;
            let place = match usize::try_from(token.rank) {
                Err(_) => self.token.get_mut(position),
                Ok(rank) => {
                    let range = self.top.range(position);
                    self.top.values[range].get_mut(rank)
                }
            };
            if let (Some(place), Some(bytes)) = (place, token.bytes())
                && place.is_empty()
            {
                *place = Cow::Owned(bytes);
            }
        }
    }
}

impl<'a> From<StoredLogprobs<'a>> for LogprobsView<'a> {
    fn from(stored: StoredLogprobs<'a>) -> Self {
        // These keep the allocation.
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
        view.put_raw(&stored.raw);
        view
    }
}

/// Lists, end to end.
#[derive(Debug, Clone, PartialEq)]
pub struct FlatLists<T> {
    values: Vec<T>,
    /// Where each list ends.
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
    fn range(&self, at: usize) -> Range<usize> {
        match (at.checked_sub(1), self.ends.get(at)) {
            (_, None) => 0..0,
            (None, Some(&end)) => 0..end,
            (Some(before), Some(&end)) => self.ends[before]..end,
        }
    }

    /// The list at `at`; an empty one behind the last.
    pub fn get(&self, at: usize) -> &[T] {
        &self.values[self.range(at)]
    }

    /// Number of lists.
    pub fn lists(&self) -> usize {
        self.ends.len()
    }

    /// Values in all lists.
    pub fn total(&self) -> usize {
        self.values.len()
    }

    /// Makes room for so many values in so many lists.
    pub fn reserve(&mut self, values: usize, lists: usize) {
        self.values.reserve(values);
        self.ends.reserve(lists);
    }

    /// Appends a value to the list that [`Self::end`] ends.
    pub fn push(&mut self, value: T) {
        self.values.push(value);
    }

    /// Ends a list.
    pub fn end(&mut self) {
        self.ends.push(self.values.len());
    }

    fn from_lists<'a, U: 'a>(
        lists: impl IntoIterator<Item = &'a Vec<U>>,
        value: impl Fn(&'a U) -> T,
    ) -> Self {
        let mut all = Self::default();
        for list in lists {
            all.values.extend(list.iter().map(&value));
            all.ends.push(all.values.len());
        }
        all
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
                let mut all = FlatLists::default();
                while lists
                    .next_element_seed(ListVisitor(&mut all.values))?
                    .is_some()
                {
                    all.ends.push(all.values.len());
                }
                Ok(all)
            }
        }

        deserializer.deserialize_seq(ListsVisitor(PhantomData))
    }
}

/// The fields of [`Logprobs`] as they stand in a line.
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

/// The bytes of a JSON string; borrowed unless it has escapes.
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

/// Appends a list to those before it.
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
