"""The wheels in the folder MFA_WHEELS: one per platform, of the same package, with a library that needs little."""

import email
import io
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest
from elftools.elf.elffile import ELFFile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python/mps_flash_attn"
PLATFORMS = {
    "macosx_14_0_arm64": "libmfa.dylib",
    r"manylinux_2_\d+_x86_64": "libmfa.so",
    r"manylinux_2_\d+_aarch64": "libmfa.so",
}
MACHINES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
SYSTEM = {"libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"}


def find(platform):
    pattern = re.compile(rf"mps_flash_attn-[\d.]+-py3-none-{platform}\.whl")
    (file,) = (file for file in pathlib.Path(os.environ["MFA_WHEELS"]).glob("*.whl") if pattern.fullmatch(file.name))
    return file


@pytest.fixture(params=PLATFORMS)
def platform(request):
    return request.param


@pytest.fixture
def wheel(platform):
    with zipfile.ZipFile(find(platform)) as archive:
        yield archive


def metadata(wheel, name):
    (file,) = (file for file in wheel.namelist() if file.endswith(f".dist-info/{name}"))
    return wheel.read(file).decode()


def test_holds_the_package_and_its_library_and_nothing_else(wheel, platform):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {f"mps_flash_attn/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    assert inside == package | {f"mps_flash_attn/{PLATFORMS[platform]}", "mps_flash_attn/py.typed"}


def test_package_is_that_of_the_tree(wheel):
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        assert wheel.read(f"mps_flash_attn/{name}") == path.read_bytes(), name


def run(*words):
    subprocess.run([sys.executable, "-m", *words], check=True)


def test_tools_find_nothing_wrong(platform, tmp_path):
    file = find(platform)
    run("wheel", "unpack", file, "-d", tmp_path)  # checks every file against RECORD
    run("check_wheel_contents", file)
    run("twine", "check", "--strict", file)  # the metadata, and that README.md can be shown


def test_says_what_it_is(wheel):
    about = email.message_from_string(metadata(wheel, "METADATA"))
    assert about["Name"] == "mps-flash-attn" and about["License-Expression"] == "MIT"
    version = ".".join(re.findall(r"define MFA_VERSION_\w+ (\d+)", (ROOT / "include/mfa.h").read_text()))
    assert about["Version"] == version
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    needed = [name for name in about.get_all("Requires-Dist") if "extra ==" not in name]
    assert sorted(needed) == sorted(re.findall(r'"(.*?)"', dependencies))
    tags = email.message_from_string(metadata(wheel, "WHEEL")).get_all("Tag")
    assert [f"mps_flash_attn-{version}-{tag}.whl" for tag in tags] == [pathlib.Path(wheel.filename).name]


@pytest.fixture(params=MACHINES)
def elf(request):
    file = find(rf"manylinux_2_\d+_{request.param}")
    with zipfile.ZipFile(file) as archive:
        library = ELFFile(io.BytesIO(archive.read("mps_flash_attn/libmfa.so")))
    assert library["e_machine"] == MACHINES[request.param]
    library.promised = int(re.search(r"manylinux_2_(\d+)", file.name)[1])  # of glibc, by the wheel's name
    return library


def test_linux_library_needs_the_promised_glibc(elf):
    needed = [
        int(re.fullmatch(r"GLIBC_2\.(\d+)(?:\.\d+)?", version.name)[1])
        for _, versions in elf.get_section_by_name(".gnu.version_r").iter_versions()
        for version in versions
    ]
    assert max(needed) == elf.promised


def test_linux_library_is_linked_with_the_system_alone(elf):
    dynamic = elf.get_section_by_name(".dynamic")
    assert {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")} <= SYSTEM
    assert not list(dynamic.iter_tags("DT_RPATH")) + list(dynamic.iter_tags("DT_RUNPATH"))


def test_linux_library_exports_what_is_promised(elf):
    exported = [
        symbol.name
        for symbol in elf.get_section_by_name(".dynsym").iter_symbols()
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
    ]
    assert sorted(exported) == (ROOT / "tests/symbols.txt").read_text().split()


def test_installed_wheel_finds_its_library():
    """This machine's, as pip has installed it beside the wheels."""
    site = pathlib.Path(os.environ["MFA_WHEELS"]) / "site"
    program = "import mps_flash_attn, torch; q = torch.ones(1, 1, 4, 8); mps_flash_attn.flash_attention(q, q, q)"
    environment = {name: value for name, value in os.environ.items() if name != "MFA_LIBRARY"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment | {"PYTHONPATH": str(site)})
    assert (site / "mps_flash_attn/libmfa.so").is_file()
