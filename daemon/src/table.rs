//! Tables for people: columns aligned, numbers to the right, nothing drawn.

use std::fmt;

/// Where a column's text goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// A table being filled.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles; a title that begins with `>` is of a column aligned to the right.
    pub(crate) fn new<const N: usize>(titles: [&str; N]) -> Self {
        let column = |title: &str| match title.strip_prefix('>') {
            Some(title) => (title.to_owned(), Align::Right),
            None => (title.to_owned(), Align::Left),
        };
        Table { columns: titles.map(column).into(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len(), "a row has a cell for every column");
        self.rows.push(cells.into());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles: Vec<String> = self.columns.iter().map(|(title, _)| title.to_uppercase()).collect();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| {
                let cells = std::iter::once(&titles).chain(&self.rows).filter_map(|row| row.get(i));
                cells.map(|c| c.chars().count()).max().unwrap_or(0)
            })
            .collect();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, &width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                match align {
                    Align::Left => line.push_str(&format!("{cell:<width$}  ")),
                    Align::Right => line.push_str(&format!("{cell:>width$}  ")),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks() {
        let mut table = Table::new(["name", ">size", "note"]);
        table.row(["a".into(), "1".into(), String::new()]);
        table.row(["longer".into(), "1000".into(), "x".into()]);
        assert_eq!(table.to_string(), "NAME    SIZE  NOTE\na          1\nlonger  1000  x\n");
    }
}
