//! Deserializes objects into structs with named fields and a map of all other fields, like serde's `flatten`, but
//! without the copy of every value that `flatten` makes. Of duplicate fields, the last one that is not null counts.

/// Implements `Deserialize` for structs with a parameter `L` that have the given fields and
/// `extra: Map<String, Value>`. Missing fields get the default of their type.
macro_rules! fields {
    ($($object:ident: $($field:ident),+;)+) => {$(
        impl<'de, L: serde::Deserialize<'de>> serde::Deserialize<'de> for $object<L> {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Fields<L>(std::marker::PhantomData<L>);

                impl<'de, L: serde::Deserialize<'de>> serde::de::Visitor<'de> for Fields<L> {
                    type Value = $object<L>;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("an object")
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(
                        self,
                        mut map: A,
                    ) -> Result<Self::Value, A::Error> {
                        let mut object = $object {
                            $($field: Default::default(),)+
                            extra: Default::default(),
                        };
                        while let Some(name) = map.next_key::<crate::client::response::fields::Name>()? {
                            match &*name.0 {
                                $(stringify!($field) => if let Some(value) = map.next_value()? {
                                    object.$field = value;
                                },)+
                                _ => {
                                    object.extra.insert(name.0.into_owned(), map.next_value()?);
                                }
                            }
                        }
                        Ok(object)
                    }
                }

                deserializer.deserialize_map(Fields(std::marker::PhantomData))
            }
        }
    )+};
}

pub(crate) use fields;

/// Name of a field, borrowed from the text if it contains no escape.
#[derive(serde::Deserialize)]
pub(crate) struct Name<'a>(#[serde(borrow)] pub std::borrow::Cow<'a, str>);
