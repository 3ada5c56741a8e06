//! A measured row.

use serde::Serialize;

/// What was measured, against what.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// What Dormouse took.
    pub value: f64,
    /// The unit of `value` and `floor`.
    pub unit: &'static str,
    /// What physics takes, or what it is compared to.
    pub floor: f64,
    /// `value / floor`.
    pub ratio: f64,
    /// The ratio aimed for; `None` where it is only reported.
    pub target: Option<f64>,
    /// Whether `ratio` is on the right side of `target`.
    pub met: Option<bool>,
}

impl Row {
    /// A row whose ratio should be at most `target`.
    pub fn at_most(name: &str, unit: &'static str, value: f64, floor: f64, target: f64) -> Self {
        let ratio = value / floor;
        Row { target: Some(target), met: Some(ratio <= target), ..Self::reported(name, unit, value, floor) }
    }

    /// A row whose ratio should be at least `target`.
    pub fn at_least(name: &str, unit: &'static str, value: f64, floor: f64, target: f64) -> Self {
        let ratio = value / floor;
        Row { target: Some(target), met: Some(ratio >= target), ..Self::reported(name, unit, value, floor) }
    }

    /// A row without a target.
    pub fn reported(name: &str, unit: &'static str, value: f64, floor: f64) -> Self {
        Row { name: name.to_owned(), value, unit, floor, ratio: value / floor, target: None, met: None }
    }
}
