//! The calls that make things durable or change names, answered in the C library's place.
//!
//! The standard library and `memmap2` call `fsync` and its like by name, and the linker takes the functions of this
//! program before those of a shared library. So the crate under test runs unchanged and every one of its calls passes
//! here, whichever thread makes it. For files outside of every [`Disk`](super::disk::Disk) they go on to the kernel.
//! Within one, a sync only tells the model: the page cache is what the images are made from, so a real one would add
//! nothing but time.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::disk::{Disk, disk_of, has_any_failed};

/// The path that a descriptor stands for; none for what has no name.
fn path_of(descriptor: c_int) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{descriptor}")).ok()
}

fn argument(path: *const c_char) -> PathBuf {
    // SAFETY: the caller passes what `rename` and `unlink` take: a string that ends with a zero.
    let bytes = unsafe { CStr::from_ptr(path) }.to_bytes();
    Path::new(OsStr::from_bytes(bytes)).to_owned()
}

/// By its inode: another thread may be renaming it. Gives the call's answer.
fn synced(descriptor: c_int) -> Option<c_int> {
    let disk = disk_of(&path_of(descriptor)?)?;
    let inode = std::fs::metadata(format!("/proc/self/fd/{descriptor}")).ok()?.ino();
    if disk.sync_fails(inode, 0..u64::MAX) {
        return Some(failed());
    }
    disk.synced(inode);
    Some(0)
}

/// The answer of a sync that fails.
fn failed() -> c_int {
    // SAFETY: this thread's error number.
    unsafe { *libc::__errno_location() = libc::EIO };
    -1
}

fn kernel(answer: i64) -> c_int {
    c_int::try_from(answer).unwrap_or(-1)
}

#[unsafe(no_mangle)]
extern "C" fn fsync(descriptor: c_int) -> c_int {
    match synced(descriptor) {
        Some(answer) => answer,
        // SAFETY: the arguments that the call takes.
        None => kernel(unsafe { libc::syscall(libc::SYS_fsync, descriptor) }),
    }
}

#[unsafe(no_mangle)]
extern "C" fn fdatasync(descriptor: c_int) -> c_int {
    match synced(descriptor) {
        Some(answer) => answer,
        // SAFETY: the arguments that the call takes.
        None => kernel(unsafe { libc::syscall(libc::SYS_fdatasync, descriptor) }),
    }
}

/// On Linux this is `fdatasync` for a range of the mapped file, the file's length included.
#[unsafe(no_mangle)]
extern "C" fn msync(address: *mut c_void, len: usize, flags: c_int) -> c_int {
    let mut is_seen = false;
    if flags & libc::MS_SYNC != 0 {
        let (start, end) = (address as u64, address as u64 + len as u64);
        for Mapped { addresses, offset, inode, path } in mapped_files(start, end) {
            if let Some(disk) = disk_of(&path) {
                let (from, to) = (start.max(addresses.start), end.min(addresses.end));
                let range = from - addresses.start + offset..to - addresses.start + offset;
                if disk.sync_fails(inode, range.clone()) {
                    return failed();
                }
                disk.range_synced(inode, range);
                is_seen = true;
            }
        }
    }
    if is_seen {
        return 0;
    }
    // SAFETY: the arguments that the call takes, as they were passed.
    kernel(unsafe { libc::syscall(libc::SYS_msync, address, len, flags) })
}

/// What is written is written back by the next sync, also where that failed before and nothing has changed.
#[unsafe(no_mangle)]
extern "C" fn pwrite64(descriptor: c_int, bytes: *const c_void, len: usize, offset: i64) -> isize {
    let disk = if has_any_failed() { path_of(descriptor).and_then(|path| disk_of(&path)) } else { None };
    let is_full = disk.as_ref().is_some_and(|disk| disk.is_full());
    let len = if is_full { len / 2 } else { len };
    // SAFETY: the arguments that the call takes, as they were passed, or fewer bytes.
    let written = unsafe { libc::syscall(libc::SYS_pwrite64, descriptor, bytes, len, offset) };
    if let (Some(disk), Ok(written), Ok(offset)) = (disk, u64::try_from(written), u64::try_from(offset))
        && let Ok(metadata) = std::fs::metadata(format!("/proc/self/fd/{descriptor}"))
    {
        disk.written(metadata.ino(), offset..offset + written);
    }
    if is_full {
        // SAFETY: this thread's error number.
        unsafe { *libc::__errno_location() = libc::ENOSPC };
        return -1;
    }
    isize::try_from(written).unwrap_or(-1)
}

#[unsafe(no_mangle)]
extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    let (from_path, to_path) = (argument(from), argument(to));
    // SAFETY: the arguments that the call takes, as they were passed.
    let call = || kernel(unsafe { libc::syscall(libc::SYS_renameat2, libc::AT_FDCWD, from, libc::AT_FDCWD, to, 0) });
    on_disk(&from_path, |disk| disk.rename(&from_path, &to_path, call), call)
}

#[unsafe(no_mangle)]
extern "C" fn unlink(path: *const c_char) -> c_int {
    let gone = argument(path);
    // SAFETY: the arguments that the call takes, as they were passed.
    let call = || kernel(unsafe { libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, path, 0) });
    on_disk(&gone, |disk| disk.unlink(&gone, call), call)
}

fn on_disk(path: &Path, seen: impl FnOnce(&Disk) -> c_int, call: impl FnOnce() -> c_int) -> c_int {
    match disk_of(path) {
        Some(disk) => seen(&disk),
        None => call(),
    }
}

/// A part of a file in memory.
struct Mapped {
    addresses: Range<u64>,
    /// Where it begins in the file.
    offset: u64,
    inode: u64,
    path: PathBuf,
}

/// The files mapped anywhere in a range of addresses.
fn mapped_files(start: u64, end: u64) -> Vec<Mapped> {
    let Ok(maps) = std::fs::read("/proc/self/maps") else { return Vec::new() };
    maps.split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let line = std::str::from_utf8(line).ok()?;
            let (addresses, rest) = line.split_once(' ')?;
            let (from, to) = addresses.split_once('-')?;
            let addresses = u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?;
            if addresses.end <= start || addresses.start >= end {
                return None;
            }
            // Rights, offset, device, inode.
            let mut fields = rest.split_ascii_whitespace().skip(1);
            let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
            let inode = fields.nth(1)?.parse().ok()?;
            Some(Mapped { addresses, offset, inode, path: PathBuf::from(&rest[rest.find('/')?..]) })
        })
        .collect()
}
