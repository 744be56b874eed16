import pytest

from server.config import ServerConfig
from server.state import model_names


def test_herd_listens_on_this_machine_only_by_default():
    config = ServerConfig()
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert (config.api_key, config.allowed_origins) == ((), ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70_000), ("max_queued_requests", -1), ("max_request_bytes", 0), ("api_key", ("",)),
        ("admin_api_key", ""), ("ssl_keyfile", "key.pem"), ("shutdown_timeout_s", -1.0),
        ("sse_ping_interval_s", 0.0), ("adapter", ("=x",)), ("adapter", ("name=",)),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        ServerConfig(**{field: value})


def test_the_base_is_called_as_asked_or_by_its_folder():
    assert tuple(model_names(ServerConfig(), "/models/llama-7b")) == ("llama-7b",)
    config = ServerConfig(served_model_name=("a", "b"))
    assert tuple(model_names(config, "/models/llama-7b")) == ("a", "b")
