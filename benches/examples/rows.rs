#![allow(missing_docs, unused_crate_dependencies)]
fn main() {
    let mut options = dormouse_benches::Options { quick: true, ..Default::default() };
    for arg in std::env::args().skip(1) {
        if arg == "--full" { options.quick = false } else { options.only = Some(arg) }
    }
    match dormouse_benches::run(&options, |_| ()) {
        Ok(rows) => {
            for r in rows {
                println!(
                    "{:22} {:10.2} {:10.2} {:9} ratio {:.3} target {:?} {:?}",
                    r.name, r.value, r.floor, r.unit, r.ratio, r.target, r.met
                );
            }
        }
        Err(e) => println!("error: {e}"),
    }
}
