//! A fuzz target linked to libFuzzer: `DORMOUSE_FUZZ_TARGET` names it, `scripts/fuzz` builds and runs all. Built without
//! libFuzzer, it checks the files it is given: `cargo run -p dormouse-fuzz -- TARGET FILE...`.
#![cfg_attr(feature = "libfuzzer", no_main)]

#[cfg(feature = "libfuzzer")]
mod linked {
    use std::sync::LazyLock;

    static TARGET: LazyLock<dormouse_fuzz::Target> = LazyLock::new(|| {
        let name = std::env::var("DORMOUSE_FUZZ_TARGET").expect("DORMOUSE_FUZZ_TARGET names a target");
        dormouse_fuzz::target(&name).unwrap_or_else(|| panic!("there is no target {name}"))
    });

    libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (TARGET.check)(bytes));
}

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::process::ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(target) = arguments.next().and_then(|name| dormouse_fuzz::target(&name)) else {
        for target in dormouse_fuzz::TARGETS {
            println!("{}", target.name);
        }
        return std::process::ExitCode::SUCCESS;
    };
    for path in arguments {
        match std::fs::read(&path) {
            Ok(bytes) => (target.check)(&bytes),
            Err(error) => {
                eprintln!("{path}: {error}");
                return std::process::ExitCode::FAILURE;
            }
        }
    }
    std::process::ExitCode::SUCCESS
}
