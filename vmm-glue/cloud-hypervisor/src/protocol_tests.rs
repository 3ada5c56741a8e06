use super::*;
use proptest::prelude::*;

#[test]
fn heads_have_the_bytes_cloud_hypervisor_sends() {
    let state = Request { command: Command::State, length: 0x1234 };
    assert_eq!(state.encode(), [3, 0, 0, 0, 0, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0, 0, 0]);
    assert_eq!(Response::Ok.encode()[..3], [1, 0, 0]);
    let range = GuestRange { address: 0x4000, length: 0x1000 };
    assert_eq!(range.encode(), [0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
    assert_eq!(FAULT_ROLE, [2, 0]);
}

#[test]
fn every_head_survives_a_round_trip() {
    for command in Command::ALL {
        let request = Request { command, length: *command.payload().start() };
        assert_eq!(Request::decode(&request.encode()), Ok(request));
    }
    for response in [Response::Ok, Response::Error] {
        assert_eq!(Response::decode(&response.encode()), Ok(response));
    }
}

#[test]
fn another_version_is_named_and_residual_parameter_bytes_ignored() {
    let mut head = Request { command: Command::Start, length: 0 }.encode();
    head[4..8].fill(0xaa);
    assert!(Request::decode(&head).is_ok());
    head[2] = 1;
    assert_eq!(Request::decode(&head), Err(ProtocolError::Version(1)));
}

#[test]
fn a_length_that_would_be_allocated_is_bounded() {
    for (command, length) in [
        (Command::Config, CONFIG_BYTES_MAX + 1),
        (Command::State, u64::MAX),
        (Command::MemoryFd, 8),
        (Command::PageFault, 32),
    ] {
        let head = Request { command, length }.encode();
        assert_eq!(Request::decode(&head), Err(ProtocolError::Length { command, length }));
    }
}

#[test]
fn a_vm_sleeps_in_one_order_only() {
    let order = [
        Command::Start,
        Command::MemoryFd,
        Command::MemoryFd,
        Command::Config,
        Command::State,
        Command::CompletePaused,
    ];
    let mut at = SleepSequence::default();
    for command in order {
        for wrong in Command::ALL {
            let next = at.step(wrong);
            let ends_early =
                matches!(next, Ok(SleepSequence::Completed)) && at != SleepSequence::StateReceived;
            assert!(!ends_early, "{wrong:?} completes from {at:?}");
        }
        at = at.step(command).expect("in order");
    }
    assert_eq!(at, SleepSequence::Completed);
    assert!(Command::ALL.into_iter().all(|c| at.step(c).is_err()), "nothing follows the end");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in any::<[u8; HEAD_BYTES]>()) {
        let _ = Response::decode(&bytes);
        if let Ok(request) = Request::decode(&bytes) {
            prop_assert!(request.command.payload().contains(&request.length));
        }
        if let Ok(range) = GuestRange::decode(&bytes) {
            prop_assert!(range.length > 0 && range.address.checked_add(range.length).is_some());
            prop_assert_eq!(range.encode(), bytes);
        }
    }
}
