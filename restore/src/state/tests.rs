use proptest::prelude::*;

use super::*;

fn events() -> impl Strategy<Value = Vec<PageEvent>> {
    prop::collection::vec(prop::sample::select(PageEvent::ALL.to_vec()), 0..64)
}

#[test]
fn removed_is_for_ever_and_only_ever_zero() {
    for event in PageEvent::ALL {
        let (next, action) = step(PageState::Removed, event);
        assert_eq!(next, PageState::Removed, "{event:?} brought a removed page back");
        assert!(!matches!(action, Action::Install | Action::Schedule | Action::Poison));
    }
    for state in PageState::ALL {
        assert_eq!(step(state, PageEvent::Removed).0, PageState::Removed);
    }
}

/// A vCPU may wait for a page in any state but those that answer it by themselves; a poisoned one may not be woken yet.
#[test]
fn whoever_waits_for_a_page_that_is_removed_is_woken() {
    for state in PageState::ALL {
        let answered = matches!(state, PageState::Installed | PageState::Removed);
        assert_eq!(step(state, PageEvent::Removed).1 == Action::Wake, !answered, "{state:?}");
    }
}

#[test]
fn bytes_name_states_and_unknown_bytes_fail_closed() {
    for state in PageState::ALL {
        assert_eq!(PageState::from_u8(state as u8), state);
    }
    assert_eq!(PageState::from_u8(200), PageState::Poisoned);
}

#[test]
fn only_a_removed_page_is_ever_zero_filled_on_a_fault() {
    for state in PageState::ALL {
        for event in PageEvent::ALL {
            let (_, action) = step(state, event);
            assert_eq!(
                action == Action::InstallZero,
                state == PageState::Removed && event == PageEvent::Fault
            );
        }
    }
}

proptest! {
    /// Nobody waits for ever: after a fault, the page is settled, or an action that leads there was asked for, or it was
    /// told that there is none.
    #[test]
    fn every_wait_is_answered(history in events()) {
        let mut state = PageState::Absent;
        let (mut waiting, mut pending_work, mut told, mut claims) = (false, false, false, 0i32);
        for event in history {
            // Only what its owner can do: no result without a claim.
            use PageEvent as E;
            let of_owner = matches!(event, E::Copied | E::AlreadyThere | E::Released | E::Withheld | E::Poisoned);
            if of_owner && claims == 0 {
                continue;
            }
            let (next, action) = step(state, event);
            match event {
                PageEvent::Fault => waiting = true,
                PageEvent::Copied | PageEvent::AlreadyThere => { claims -= 1; waiting = waiting && next == PageState::Removed && action == Action::None }
                PageEvent::Released | PageEvent::Poisoned => claims -= 1,
                PageEvent::Withheld => { claims -= 1; told = true }
                _ => {}
            }
            match action {
                Action::Schedule => pending_work = true,
                // Whoever is on the way finds it claimed, and turns back.
                Action::Install | Action::Poison => { claims += 1; (pending_work, told) = (false, false) }
                Action::Wake | Action::InstallZero => waiting = false,
                Action::None => {}
            }
            state = next;
            prop_assert!(claims <= 1, "claimed twice");
            prop_assert!(!waiting || pending_work || told || claims > 0, "a vCPU waits and nobody works: {state:?}");
        }
    }

    #[test]
    fn settled_stays_settled(history in events()) {
        let mut state = PageState::Absent;
        for event in history {
            let (next, _) = step(state, event);
            prop_assert!(!state.is_settled() || next.is_settled());
            state = next;
        }
    }
}
