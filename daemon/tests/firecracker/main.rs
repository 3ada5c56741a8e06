//! Real Firecracker through the built binary: set `DORMOUSE_FIRECRACKER` to Firecracker's. With
//! `DORMOUSE_REQUIRE_FIRECRACKER=1` its absence is a failure. The guest verifies its own memory: it says `.` for
//! every pass over all of it, and `X` for a wrong page.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

mod balloon;
mod collector;
mod cut_off;
mod documents;
mod failures;
mod generations;
mod held_store;
mod hostile;
mod huge_pages;
mod huge_stream;
mod in_doubt;
mod interrupted;
mod jail;
mod limits;
mod not_ours;
mod scene;
mod serve_api;
mod serve_kept;
mod serve_uffd;
mod serve_vms;
mod served;
mod signals;
mod slow_s3;
mod slow_store;
mod survival;
mod traces;
mod two_standbys;
mod working_set;
