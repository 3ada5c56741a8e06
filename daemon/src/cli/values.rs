//! Values of options, parsed and checked before anything is done.

use std::{ops::Range, path::PathBuf, str::FromStr, time::Duration};

use dormouse_core::ImageId;

/// `ID=FILE`: a disk or a device state, and the file it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) id: ImageId,
    pub(crate) file: PathBuf,
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, file) = text.split_once('=').ok_or("write it as ID=FILE, for example root=disk.img")?;
        if file.is_empty() {
            return Err("the file is missing after '='".into());
        }
        Ok(Part { id: ImageId::new(id).map_err(|e| e.to_string())?, file: file.into() })
    }
}

/// `ID=RANGES`: an image and the pages of it that changed, as `0..16,512..520`, or `@FILE` with a range a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DirtyPages {
    pub(crate) id: ImageId,
    pub(crate) ranges: Vec<Range<u64>>,
}

impl FromStr for DirtyPages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, ranges) =
            text.split_once('=').ok_or("write it as ID=RANGES, for example memory=0..16,512..520")?;
        let read;
        let ranges = match ranges.strip_prefix('@') {
            None => ranges,
            Some(file) => {
                read = std::fs::read_to_string(file).map_err(|e| format!("reading {file}: {e}"))?;
                &read
            }
        };
        let parts = ranges.split([',', '\n']).map(str::trim).filter(|r| !r.is_empty());
        Ok(DirtyPages {
            id: ImageId::new(id).map_err(|e| e.to_string())?,
            ranges: parts.map(range).collect::<Result<_, _>>()?,
        })
    }
}

/// `START..END`, the end not included, or one page.
fn range(text: &str) -> Result<Range<u64>, String> {
    let number =
        |n: &str| n.parse::<u64>().map_err(|_| format!("{text:?} is no range of pages; write START..END"));
    match text.split_once("..") {
        None => number(text).and_then(|n| Ok(n..n.checked_add(1).ok_or("that page is out of range")?)),
        Some((start, end)) => match (number(start)?, number(end)?) {
            (start, end) if start < end => Ok(start..end),
            _ => Err(format!("{text:?} is empty; its end comes after its last page")),
        },
    }
}

/// `KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) key: String,
    pub(crate) value: String,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("", _)) => Err("the key is missing before '='".into()),
            Some((key, value)) => Ok(Label { key: key.into(), value: value.into() }),
            None => Err("write it as KEY=VALUE".into()),
        }
    }
}

/// A hundred years: moments that far away can be reckoned with.
pub(crate) const LONGEST_S: u64 = 100 * 365 * 24 * 60 * 60;

/// A length of time: a number and `s`, `m`, `h` or `d`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write it as a number and a unit, for example 0s, 15m, 24h or 30d".to_string();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit_s = match &text[digits.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return Err(wrong()),
    };
    number
        .checked_mul(unit_s)
        .filter(|s| *s <= LONGEST_S)
        .map(Duration::from_secs)
        .ok_or_else(|| "that is longer than any machine lives".into())
}

/// A number of bytes, or with K, M, G or T of so many times 1024.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || "write it as a number of bytes, or with a unit: 512M, 2G".to_string();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "that is more than there is anywhere".into())
}

/// A price: dollars, not negative.
pub(crate) fn dollars(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(price) if price.is_finite() && price >= 0.0 => Ok(price),
        _ => Err("write the price in dollars for a gigabyte and month, for example 0.023".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        assert_eq!(["7", "3K", "512M", "2G"].map(bytes), [7, 3 << 10, 512 << 20, 2 << 30].map(Ok));
        for wrong in ["", "M", "1.5G", "-1", "3MB", "99999999T"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_part_is_an_id_and_a_file_which_may_hold_further_equal_signs() {
        let part: Part = "root=/tmp/a=b.img".parse().expect("a part");
        assert_eq!((part.id.as_str(), part.file), ("root", "/tmp/a=b.img".into()));
        for wrong in ["root", "root=", "=file", "no spaces=file", "-x=file"] {
            assert!(wrong.parse::<Part>().is_err(), "{wrong:?} was taken for a part");
        }
    }

    #[test]
    fn dirty_pages_are_ranges_without_their_ends_or_single_pages() {
        let dirty: DirtyPages = "memory=0..16, 512..520,7".parse().expect("ranges");
        assert_eq!((dirty.id.as_str(), dirty.ranges), ("memory", vec![0..16, 512..520, 7..8]));
        for wrong in
            ["memory", "memory=a..b", "memory=5..5", "memory=9..3", "=1..2", "memory=18446744073709551615"]
        {
            assert!(wrong.parse::<DirtyPages>().is_err(), "{wrong:?} was taken for dirty pages");
        }
    }

    #[test]
    fn durations_have_a_unit_and_do_not_overflow() {
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        assert_eq!(duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
        for wrong in [
            "",
            "5",
            "s",
            "-1s",
            "1.5h",
            "1w",
            "99999999999999999999s",
            "18446744073709551615d",
            "18446744073709551615s",
        ] {
            assert!(duration(wrong).is_err(), "{wrong:?} was taken for a duration");
        }
    }

    #[test]
    fn prices_are_finite_and_not_negative() {
        assert_eq!(dollars("0.023"), Ok(0.023));
        for wrong in ["-1", "nan", "inf", "free"] {
            assert!(dollars(wrong).is_err(), "{wrong:?} was taken for a price");
        }
    }
}
