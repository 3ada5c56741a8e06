//! Numbers as people read them.

/// `1.5 MiB`, `120 B`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be printed as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Dollars, with as many digits as a small sum needs.
pub(crate) fn dollars(amount: f64) -> String {
    match amount {
        0.0 => "$0".into(),
        a if a < 0.000_001 => "< $0.000001".into(),
        a if a < 0.01 => format!("${a:.6}"),
        a if a < 1.0 => format!("${a:.4}"),
        a => format!("${a:.2}"),
    }
}

/// `part` as a share of `whole`.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.1} %", part as f64 * 100.0 / whole as f64) }
}

/// Milliseconds since 1970 as `2026-11-23 10:44 UTC`; `-` for none.
pub(crate) fn moment(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return "-".into();
    }
    let minutes = unix_ms / 60_000;
    let (days, minute) = (minutes / 1440, minutes % 1440);
    // Days to a date of the Gregorian calendar, by eras of 400 years that begin on 1 March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", minute / 60, minute % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_change_their_unit_where_they_should() {
        let cases =
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB")];
        for (value, text) in cases {
            assert_eq!(bytes(value), text);
        }
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB", "not 1024.0 KiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
    }

    #[test]
    fn small_sums_are_not_shown_as_nothing() {
        let cases =
            [(0.0, "$0"), (1e-9, "< $0.000001"), (0.000_9, "$0.000900"), (0.25, "$0.2500"), (12.5, "$12.50")];
        for (amount, text) in cases {
            assert_eq!(dollars(amount), text);
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let cases = [
            (0, "-"),
            (60_000, "1970-01-01 00:01 UTC"),
            (951_782_400_000, "2000-02-29 00:00 UTC"),
            (1_709_251_199_000, "2024-02-29 23:59 UTC"),
            (1_709_251_200_000, "2024-03-01 00:00 UTC"),
            (4_102_444_799_000, "2099-12-31 23:59 UTC"),
        ];
        for (unix_ms, text) in cases {
            assert_eq!(moment(unix_ms), text);
        }
    }
}
