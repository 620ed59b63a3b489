//! How fields become bytes: the little machinery that the messages share.
//!
//! A message is the bytes of its fields, one after the other in the order of its struct.

use crate::limits::MAX_ERROR_TEXT_LEN;
use crate::types::{Chain, ClusterId, Epoch, Lsn, NodeId, RegionId, SessionId, ShardId, WalSegmentId};
use crate::wire::{FrameKind, VersionRange, WireError};

/// Bytes of the longest message: an error with all the text it may have.
pub(crate) const MAX_MESSAGE_LEN: usize = 2 + MAX_ERROR_TEXT_LEN;

/// Bytes of the longest message whose length is fixed: all but errors and histories.
pub(crate) const MAX_FIXED_LEN: usize = 192;

/// The bytes of one message. Those of fixed length are kept on the stack: sending one allocates nothing, and threads
/// that only send signs of life keep no pages for the longest message that there is.
pub(crate) enum MessageBytes {
    Fixed([u8; MAX_FIXED_LEN], usize),
    Long(Vec<u8>),
}

impl MessageBytes {
    /// What `write` writes, which is at most [`MAX_FIXED_LEN`] bytes.
    pub(crate) fn fixed(write: impl FnOnce(&mut Writer<'_>)) -> MessageBytes {
        let mut bytes = [0; MAX_FIXED_LEN];
        let mut to = Writer::new(&mut bytes);
        write(&mut to);
        let len = to.len;
        MessageBytes::Fixed(bytes, len)
    }

    /// What `write` writes, which is at most [`MAX_MESSAGE_LEN`] bytes.
    pub(crate) fn long(write: impl FnOnce(&mut Writer<'_>)) -> MessageBytes {
        let mut bytes = vec![0; MAX_MESSAGE_LEN];
        let mut to = Writer::new(&mut bytes);
        write(&mut to);
        let len = to.len;
        bytes.truncate(len);
        MessageBytes::Long(bytes)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            MessageBytes::Fixed(bytes, len) => &bytes[..*len],
            MessageBytes::Long(bytes) => bytes,
        }
    }
}

/// Puts fields one after the other into memory that has room for them.
pub(crate) struct Writer<'a> {
    to: &'a mut [u8],
    len: usize,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(to: &'a mut [u8]) -> Writer<'a> {
        Writer { to, len: 0 }
    }

    #[inline]
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        self.to[self.len..end].copy_from_slice(bytes);
        self.len = end;
    }
}

/// Takes fields one after the other off the bytes of a body.
pub(crate) struct Reader<'a> {
    kind: FrameKind,
    rest: &'a [u8],
    expected: usize,
    len: usize,
}

impl<'a> Reader<'a> {
    /// Reads a body of `kind` that must have exactly `expected` bytes.
    pub(crate) fn exact(kind: FrameKind, body: &'a [u8], expected: usize) -> Result<Reader<'a>, WireError> {
        let reader = Reader { kind, rest: body, expected, len: body.len() };
        if body.len() == expected { Ok(reader) } else { Err(reader.wrong_length()) }
    }

    fn wrong_length(&self) -> WireError {
        WireError::Length { kind: self.kind, len: self.len as u64, expected: self.expected as u64 }
    }

    #[inline]
    fn chunk<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (first, rest) = self.rest.split_first_chunk().ok_or_else(|| self.wrong_length())?;
        self.rest = rest;
        Ok(*first)
    }

    pub(crate) fn unknown<T>(&self, field: &'static str, value: impl Into<u64>) -> Result<T, WireError> {
        Err(WireError::UnknownValue { kind: self.kind, field, value: value.into() })
    }
}

/// A type that has one size and one form on the wire.
pub(crate) trait Field: Sized {
    /// Bytes that it takes.
    const LEN: usize;

    fn put(&self, to: &mut Writer<'_>);

    fn take(from: &mut Reader<'_>) -> Result<Self, WireError>;
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Field for $type {
            const LEN: usize = size_of::<$type>();

            #[inline]
            fn put(&self, to: &mut Writer<'_>) {
                to.put(&self.to_le_bytes());
            }

            #[inline]
            fn take(from: &mut Reader<'_>) -> Result<Self, WireError> {
                from.chunk().map(<$type>::from_le_bytes)
            }
        }
    )*};
}

integers!(u8, u16, u32, u64, u128);

macro_rules! newtypes {
    ($($type:ident($inner:ty)),*) => {$(
        impl Field for $type {
            const LEN: usize = <$inner as Field>::LEN;

            #[inline]
            fn put(&self, to: &mut Writer<'_>) {
                self.0.put(to);
            }

            #[inline]
            fn take(from: &mut Reader<'_>) -> Result<Self, WireError> {
                <$inner as Field>::take(from).map($type)
            }
        }
    )*};
}

newtypes!(Chain(u32), ClusterId(u128), Epoch(u64), Lsn(u64), NodeId(u64), RegionId(u16), SessionId(u64), ShardId(u16));

impl Field for VersionRange {
    const LEN: usize = 4;

    fn put(&self, to: &mut Writer<'_>) {
        self.min.put(to);
        self.max.put(to);
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(VersionRange { min: u16::take(from)?, max: u16::take(from)? })
    }
}

impl Field for WalSegmentId {
    const LEN: usize = 12;

    fn put(&self, to: &mut Writer<'_>) {
        self.region.put(to);
        self.shard.put(to);
        self.first_lsn.put(to);
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(WalSegmentId { region: RegionId::take(from)?, shard: ShardId::take(from)?, first_lsn: Lsn::take(from)? })
    }
}

/// Defines a message, or the prefix of a body, whose wire form is its fields in order.
macro_rules! message {
    (
        $(#[$doc:meta])*
        pub struct $name:ident in $kind:ident {
            $( $(#[$field_doc:meta])* pub $field:ident: $type:ty, )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $type, )*
        }

        impl $name {
            /// Bytes that it takes on the wire.
            pub const LEN: usize = 0 $( + <$type as $crate::wire::codec::Field>::LEN )*;

            /// Its bytes, without allocating.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; Self::LEN] {
                let mut bytes = [0; Self::LEN];
                self.write(&mut $crate::wire::codec::Writer::new(&mut bytes));
                bytes
            }

            /// Its bytes in a vector of their own.
            #[must_use]
            pub fn to_vec(&self) -> Vec<u8> {
                self.to_bytes().to_vec()
            }

            /// Appends its bytes.
            pub fn encode(&self, to: &mut Vec<u8>) {
                to.extend_from_slice(&self.to_bytes());
            }

            /// Reads it from exactly its bytes.
            ///
            /// # Errors
            ///
            /// [`WireError`](crate::wire::WireError) if there are more or fewer bytes, or if a field means nothing.
            pub fn decode(bytes: &[u8]) -> Result<Self, $crate::wire::WireError> {
                let from = &mut $crate::wire::codec::Reader::exact(
                    $crate::wire::FrameKind::$kind, bytes, Self::LEN,
                )?;
                $( let $field = <$type as $crate::wire::codec::Field>::take(from)?; )*
                Ok(Self { $( $field ),* })
            }

            pub(in $crate::wire) fn write(&self, to: &mut $crate::wire::codec::Writer<'_>) {
                $( $crate::wire::codec::Field::put(&self.$field, to); )*
            }
        }

        const _: () = assert!($name::LEN <= $crate::wire::codec::MAX_FIXED_LEN, "a message fits in its buffer");
    };
}

/// Defines a choice that takes one byte on the wire.
macro_rules! choice {
    (
        $(#[$doc:meta])*
        pub enum $name:ident as $field:literal {
            $( $(#[$variant_doc:meta])* $variant:ident = $number:literal, )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $name {
            $( $(#[$variant_doc])* $variant = $number, )*
        }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [$name] = &[$( $name::$variant ),*];

            /// The one with this number; `None` if there is none.
            #[must_use]
            pub const fn from_wire(number: u8) -> Option<$name> {
                match number {
                    $( $number => Some($name::$variant), )*
                    _ => None,
                }
            }

            /// The number on the wire.
            #[must_use]
            pub const fn to_wire(self) -> u8 {
                self as u8
            }
        }

        impl $crate::wire::codec::Field for $name {
            const LEN: usize = 1;

            fn put(&self, to: &mut $crate::wire::codec::Writer<'_>) {
                to.put(&[self.to_wire()]);
            }

            fn take(from: &mut $crate::wire::codec::Reader<'_>) -> Result<Self, $crate::wire::WireError> {
                let number = <u8 as $crate::wire::codec::Field>::take(from)?;
                match $name::from_wire(number) {
                    Some(value) => Ok(value),
                    None => from.unknown($field, number),
                }
            }
        }
    };
}

pub(in crate::wire) use {choice, message};
