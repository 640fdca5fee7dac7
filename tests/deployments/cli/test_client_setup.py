from pathlib import Path

from typer.testing import CliRunner, Result

from deployments.cli.main import app


def reelray(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def test_the_setting_of_the_javascript_client_is_one_line() -> None:
    told = reelray("env", "--client", "js", "--url", "http://10.0.0.7:8000/")
    assert told.stdout == 'fal.config({ proxyUrl: { url: "http://10.0.0.7:8000/api/fal/proxy", when: "always" } });\n'


def test_the_settings_of_the_python_client_are_lines_for_a_shell() -> None:
    told = reelray("env", "--client", "python", "--tls", "/etc/our tls", "--connect", "127.0.0.1:8002")
    lines = told.stdout.splitlines()
    assert all(line.startswith("export ") for line in lines)
    assert "export FAL_RUN_HOST=127.0.0.1:8443/run" in lines
    assert "export FAL_QUEUE_RUN_HOST=127.0.0.1:8443/queue" in lines
    assert "export SSL_CERT_FILE='/etc/our tls/bundle.pem'" in lines
    assert "export HTTPS_PROXY=http://127.0.0.1:8002" in lines


def test_without_a_connect_listener_no_proxy_is_set() -> None:
    assert "PROXY" not in reelray("env", "--client", "python").stdout


def test_the_python_client_is_not_sent_to_plain_http() -> None:
    told = reelray("env", "--client", "python", "--url", "http://127.0.0.1:8000")
    assert (told.exit_code, "https only" in told.stderr) == (1, True)


def test_certificates_are_written_once(tmp_path: Path) -> None:
    written = reelray("tls", str(tmp_path), "--host", "gpu.example")
    assert (written.exit_code, str(tmp_path / "ca.pem") in written.stdout) == (0, True)
    again = reelray("tls", str(tmp_path))
    assert (again.exit_code, "already" in again.stderr) == (1, True)
    assert reelray("tls", str(tmp_path), "--replace").exit_code == 0


def test_a_target_without_a_port_is_told() -> None:
    assert reelray("connect", "--to", "127.0.0.1").exit_code == 2
