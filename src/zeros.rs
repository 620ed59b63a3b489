//! Zeros, which blank space on a device has.

/// Whether all bytes are zero, without an early exit inside a chunk, so that it compiles to vector instructions.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|chunk| chunk.iter().fold(0, |any, &byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_byte_anywhere_is_enough() {
        let mut bytes = vec![0; 1000];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 255, 256, 511, 767, 768, 999] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes));
            assert!(is_zero(&bytes[..at]) && is_zero(&bytes[at + 1..]));
            bytes[at] = 0;
        }
    }
}
