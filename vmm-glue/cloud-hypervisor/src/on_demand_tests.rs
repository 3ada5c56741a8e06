use super::*;

/// Zeros were tried once, and a host that was short of memory for a moment ended the VM.
#[test]
fn zeros_that_are_refused_for_a_while_are_tried_again() {
    let tried = |answers: &[Outcome], waits: usize| {
        let (mut asked, mut paused) = (0, 0);
        let answer = || {
            asked += 1;
            Ok::<_, ProvideError>(answers[(asked - 1).min(answers.len() - 1)])
        };
        let pause = || {
            paused += 1;
            paused <= waits
        };
        (patiently(answer, pause).expect("no error"), asked)
    };
    use Outcome::{Again, AlreadyThere, Done, NoMemory, Refused};
    assert_eq!(tried(&[NoMemory, Again, NoMemory, Done], 9), (true, 4));
    assert_eq!(tried(&[Again, AlreadyThere], 9), (true, 2));
    assert_eq!(tried(&[Refused(libc::EIO), Done], 9), (false, 1), "that does not pass");
    assert_eq!(tried(&[NoMemory], 3), (false, 4), "nobody waits any more");
    assert_eq!(tried(&[NoMemory], usize::MAX), (false, INSTALL_TRIES as usize), "not for ever");
}
