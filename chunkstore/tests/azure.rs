//! The store on Azure's protocol, against Azurite: at the path in `DORMOUSE_AZURITE`, or `azurite-blob` on `PATH`. Where
//! there is none the tests say that they skip themselves, and with `DORMOUSE_REQUIRE_AZURE=1` they fail instead.
#![allow(clippy::unwrap_used)]

mod cloud;
mod common;

use cloud::{Cloud, tests_of, tests_of_endpoints};

const AZURE: Cloud = Cloud {
    name: "Azure",
    url: "az://bucket/some/prefix",
    url_of_nothing: "az://nobody-made-this/prefix",
    no_such: "ContainerNotFound",
    require: "DORMOUSE_REQUIRE_AZURE",
    variable: "DORMOUSE_AZURITE",
    program: "azurite-blob",
    arguments: &[
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        "0",
        "--inMemoryPersistence",
        "--disableTelemetry",
        "--silent",
    ],
    // Signed with the key that every such server has, until the end of this century.
    make_bucket: "/devstoreaccount1/bucket?restype=container&sv=2021-08-06&ss=b&srt=sco&sp=rwdlac&\
                  se=2099-01-01T00%3A00%3A00Z&sig=96c2EygB3PgwPw%2FPybbUy3WlHCPrp0h%2FIdLehWe2UEU%3D",
    environment: |address| {
        vec![
            ("AZURE_STORAGE_USE_EMULATOR", "true".into()),
            ("AZURITE_BLOB_STORAGE_URL", format!("http://{address}")),
        ]
    },
};

tests_of!(
    AZURE,
    snapshots_are_imported_exported_verified_and_removed,
    damaged_objects_are_named,
    of_concurrent_swaps_one_wins,
    concurrent_writers_of_one_name_win_one_after_the_other,
    a_second_host_uploads_less_than_a_hundredth,
    what_nobody_needs_is_collected,
    a_bucket_that_is_not_there_is_an_error,
);
tests_of_endpoints!(
    AZURE,
    an_endpoint_that_hangs_up_is_given_up_after_a_few_attempts,
    an_endpoint_that_is_overloaded_is_given_up_after_a_few_attempts,
    an_endpoint_that_does_not_listen_is_unavailable,
    refused_credentials_are_denied,
    a_new_object_is_written_though_the_connection_breaks,
    a_name_is_moved_though_the_connection_breaks,
);
