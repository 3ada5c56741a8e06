//! The store on S3, against `moto_server`: at the path in `DORMOUSE_MOTO`, or on `PATH`. Where there is none the tests
//! say that they skip themselves, and with `DORMOUSE_REQUIRE_S3=1` they fail instead.
#![allow(clippy::unwrap_used)]

mod cloud;
mod common;

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use bytes::Bytes;
use cloud::{Cloud, tests_of, tests_of_endpoints, with_server};
use dormouse_chunkstore::backend::{PutOutcome, open_url};

const S3: Cloud = Cloud {
    name: "S3",
    url: "s3://bucket/some/prefix",
    url_of_nothing: "s3://nobody-made-this/prefix",
    no_such: "NoSuchBucket",
    require: "DORMOUSE_REQUIRE_S3",
    variable: "DORMOUSE_MOTO",
    program: "moto_server",
    arguments: &["-H", "127.0.0.1", "-p", "0"],
    make_bucket: "/bucket",
    environment: |address| {
        vec![
            ("AWS_ENDPOINT", format!("http://{address}")),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
            ("AWS_REGION", "us-east-1".into()),
        ]
    },
};

tests_of!(
    S3,
    snapshots_are_imported_exported_verified_and_removed,
    damaged_objects_are_named,
    of_concurrent_swaps_one_wins,
    concurrent_writers_of_one_name_win_one_after_the_other,
    a_second_host_uploads_less_than_a_hundredth,
    what_nobody_needs_is_collected,
    a_bucket_that_is_not_there_is_an_error,
);
tests_of_endpoints!(
    S3,
    an_endpoint_that_hangs_up_is_given_up_after_a_few_attempts,
    an_endpoint_that_is_overloaded_is_given_up_after_a_few_attempts,
    an_endpoint_that_does_not_listen_is_unavailable,
    refused_credentials_are_denied,
    a_new_object_is_written_though_the_connection_breaks,
    a_name_is_moved_though_the_connection_breaks,
);

/// The server gives a thousand at once.
fn list_many(cloud: &Cloud) {
    const COUNT: u64 = 1050;
    let (backend, next) = (open_url(cloud.url).unwrap(), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    if n >= COUNT {
                        return;
                    }
                    let put = backend.put_new(&format!("plain/many/{n}"), Bytes::from_static(b"x"));
                    assert_eq!(put.unwrap(), PutOutcome::Created);
                }
            });
        }
    });
    let mut keys = BTreeSet::new();
    backend.list("plain/many", &mut |meta| assert!(keys.insert(meta.key))).unwrap();
    assert_eq!(keys.len() as u64, COUNT);
}

#[test]
fn a_listing_longer_than_the_server_gives_at_once_is_whole() {
    with_server(&S3, "a_listing_longer_than_the_server_gives_at_once_is_whole", list_many);
}
