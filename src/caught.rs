//! Panics in what the crate's threads call and others wrote: targets, transports, callbacks.
//!
//! A thread that ends by a panic tells nobody, and who waits for what it does would wait for ever. So such calls are
//! made within [`caught`], where a thread runs or where something must be done behind them, and a panic goes the way of
//! an error from there.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};

/// Does `work`. If it panics, that is an error which says that `whose` code did.
pub(crate) fn caught<T>(whose: impl Display, work: impl FnOnce() -> Result<T>) -> Result<T> {
    // What it leaves half done is not gone on with: whoever gets this error ends the shard, the stream or the rebuild,
    // as after any other. Marks are moved behind the deed, and locks are let go of.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Error::Panicked { whose: whose.to_string(), message: message_of(panic.as_ref()).to_owned() })
    })
}

/// What a panic says, if it says it in words.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> &str {
    let message = panic.downcast_ref::<&str>().copied();
    message.or_else(|| panic.downcast_ref().map(String::as_str)).unwrap_or("without a word")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_that_says_whose_it_was_and_what() {
        assert_eq!(caught("nobody", || Ok(7)).unwrap(), 7);
        assert!(caught("nobody", || Err::<(), _>(Error::ShutDown)).unwrap_err().is_shutdown());
        let error = caught(format_args!("the target of shard {}", 3), || -> Result<()> { panic!("at {}", 5) });
        assert_eq!(error.unwrap_err().to_string(), "the target of shard 3 panicked: at 5");
        let error = caught("it", || -> Result<()> { panic!("plain") }).unwrap_err();
        assert!(error.is_permanent() && error.to_string().ends_with("panicked: plain"), "{error}");
        let error = caught("it", || -> Result<()> { std::panic::panic_any(5) }).unwrap_err();
        assert_eq!(error.to_string(), "it panicked: without a word");
    }
}
