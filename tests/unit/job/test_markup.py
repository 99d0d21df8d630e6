"""BOINC's markup is read as BOINC reads it, within bounds; what is odd is said with its line."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmjob.job import values
from vmjob.job.markup import MAX_BYTES, MAX_DEPTH, MAX_ELEMENTS, Document, Element, parse
from vmjob.job.reading import Finding, Level


def codes(document: Document) -> list[tuple[str, int, str]]:
    return [(each.level.value, each.line, each.code) for each in document.findings]


def tree(element: Element) -> object:
    """An element without its line: name and text, or name and children."""
    return (element.name, [tree(each) for each in element.children] or element.text)


GOOD = [
    (b"<a><b>1</b><c/></a>", [("a", [("b", "1"), ("c", "")])]),
    (b"<?xml version='1.0'?>\n<a>x</a>", [("a", "x")]),
    (b"\n\n  <a>\n x y\t\n</a>", [("a", "x y")]),
    (b"<a>1<!-- c -->2<!----></a><!--  -->", [("a", "12")]),
    (b"<a>1</a>\n<b>2</b>", [("a", "1"), ("b", "2")]),
    (b"<a >x</a >", [("a", "x")]),
    (b"<a />", [("a", "")]),
    (b"<a>&lt;&gt;&amp;&quot;&apos;&#65;&#x42;</a>", [("a", "<>&\"'AB")]),
    (b"<a>cat x && ls & > y</a>", [("a", "cat x && ls & > y")]),
    (b"<a><![CDATA[<b>&lt;]]></a>", [("a", "<b>&lt;")]),
    (b"\xef\xbb\xbf<a>\xc3\xa9</a>", [("a", "é")]),
    (b"<OUTFILE_0/>", [("OUTFILE_0", "")]),
    (b"", []),
]


@pytest.mark.parametrize(("data", "roots"), GOOD)
def test_what_boinc_reads_without_a_word_has_no_finding(data: bytes, roots: list[object]) -> None:
    document = parse(data)
    assert ([tree(each) for each in document.roots], codes(document)) == (roots, [])


ODD = [
    ("an element without end, then its sibling", b"<v>\n<a>1\n<b>2</b>\n</v>",
     ("v", [("a", "1"), ("b", "2")]), [("warning", 2, "end-missing")]),
    ("a flag without its slash", b"<v><a>\n<b>2</b></v>",
     ("v", [("a", ""), ("b", "2")]), [("warning", 1, "end-missing")]),
    ("an end without its slash", b"<v><a>1<a>\n<b>2</b></v>",
     ("v", [("a", "1"), ("b", "2")]), [("warning", 1, "slash-missing")]),
    ("a block without end", b"<v><task><a>1</a>\n</v>",
     ("v", [("task", [("a", "1")])]), [("warning", 1, "end-missing")]),
    ("a block without end, then another", b"<v><task><a>1</a><task><a>2</a></task></v>",
     ("v", [("task", [("a", "1")]), ("task", [("a", "2")])]), [("warning", 1, "end-missing")]),
    ("a block whose end has no slash", b"<v><task><a>1</a>\n<task>\n</v>",
     ("v", [("task", [("a", "1")])]), [("warning", 2, "slash-missing")]),
    ("the same, then another", b"<v><task><a>1</a><task> <!-- --> <task><a>2</a></task></v>",
     ("v", [("task", [("a", "1")]), ("task", [("a", "2")])]), [("warning", 1, "slash-missing")]),
    ("text between tags", b"<v>\n<a>1</a>]\n<b/>\n\n{x}\n</v>",
     ("v", [("a", "1"), ("b", "")]), [("warning", 2, "stray-text"), ("warning", 5, "stray-text")]),
    ("text after an element without end", b"<v>\n<a>1\n<b>2</b>\nx\n</v>",
     ("v", [("a", "1"), ("b", "2")]),
     [("warning", 2, "end-missing"), ("warning", 4, "stray-text")]),
    ("a line before one that was looked at", b"<v>\n<a/>\nx\n&y;\n<b z='1'/></v>",
     ("v", [("a", ""), ("b", "")]), [("warning", 4, "unknown-entity"), ("note", 5, "attribute"),
                                     ("warning", 3, "stray-text")]),
    ("an end of nothing", b"<v></a>x</v>", ("v", "x"), [("warning", 1, "end-without-begin")]),
    ("an entity that nobody knows", b"<v>&lol;&#0;&#xD800;</v>", ("v", "&lol;&#0;&#xD800;"),
     [("warning", 1, "unknown-entity")] * 3),
    ("a bare angle", b"<v>\na < b <> </v>", ("v", "a < b <>"),
     [("warning", 2, "bare-angle"), ("warning", 2, "bare-angle")]),
    ("blanks before a name", b"<v>< a>1</ a></v>", ("v", [("a", "1")]),
     [("warning", 1, "blank-in-tag")] * 2),
    ("attributes", b"<v><a x='1'>1</a><b y=2 /></v>", ("v", [("a", "1"), ("b", "")]),
     [("note", 1, "attribute")] * 2),
    ("ISO 8859-1", b"<v>\n\xe9</v>", ("v", "é"), [("warning", 2, "not-utf8")]),
]


@pytest.mark.parametrize(("data", "root", "found"), [each[1:] for each in ODD],
                         ids=[each[0] for each in ODD])
def test_what_is_odd_is_read_and_said_with_its_line(data: bytes, root: object,
                                                    found: list[object]) -> None:
    document = parse(data)
    assert ([tree(each) for each in document.roots], codes(document)) == ([root], found)


REFUSED = [
    (b"<v>\n<a>1</a>\n", (1, "end-missing")),
    (b"<v>\n<memory", (2, "cut-off")),
    (b"<v>\n<!-- x </v>", (2, "cut-off")),
    (b"<v>\n<![CDATA[ x </v>", (2, "cut-off")),
    (b"<v>\n\0</v>", (2, "not-text")),
    ("<v>1</v>".encode("utf-16"), (1, "not-text")),
    (b"<v></v>\n<!DOCTYPE v>", (2, "document-type")),
    (b"<" + b"a" * 300 + b"/>", (1, "name-too-long")),
    (b" " * (MAX_BYTES + 1), (0, "too-large")),
    (b"<v>" + b"<a/>" * (MAX_ELEMENTS + 1) + b"</v>", (1, "too-many")),
    (b"<v>" + b"\n".join(b"<a%d>" % i for i in range(MAX_DEPTH)), (32, "too-deep")),
    (b"</a>\n" * 1000, (201, "too-many")),
]


@pytest.mark.parametrize(("data", "found"), REFUSED, ids=[each[1][1] for each in REFUSED])
def test_what_is_cut_off_or_breaks_a_bound_is_an_error(data: bytes, found: tuple[int, str]) -> None:
    document = parse(data)
    errors = [each[1:] for each in codes(document) if each[0] == "error"]
    assert errors == [found]


BILLION_LAUGHS = b"""<?xml version="1.0"?>
<!DOCTYPE lolz [
 <!ENTITY lol "lol">
 <!ENTITY lol1 "&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;">
 <!ENTITY lol2 "&lol1;&lol1;&lol1;&lol1;&lol1;&lol1;&lol1;&lol1;&lol1;&lol1;">
]>
<vbox_job><os_name>&lol2;</os_name></vbox_job>
"""


def test_entities_of_a_files_own_are_refused_before_any_is_read() -> None:
    document = parse(BILLION_LAUGHS)
    assert (document.roots, codes(document)) == ((), [("error", 2, "document-type")])


@pytest.mark.parametrize("unit", [
    b"<", b"<a>", b"<a/>", b"<!---->", b"<!--", b"&#10;", b"&x;", b"<a>x", b"</a>", b"<task>",
    b"\n<a>\n", b"<task><a>1</a>", b"<b><c>&x;\n", b"<![CDATA[", b"<?", b"< a", b"\n", b"<a b=\n>"])
def test_a_file_of_the_largest_size_is_read_in_a_moment(unit: bytes) -> None:
    data = b"<v>" + unit * ((MAX_BYTES - 3) // len(unit))
    begun = time.process_time()
    document = parse(data)
    assert time.process_time() - begun < 2
    assert any(each.level is Level.ERROR for each in document.findings)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document(data: bytes) -> None:
    check(data)


@given(st.lists(st.sampled_from(
    ["<", ">", "/", "</", "/>", "<!--", "-->", "<![CDATA[", "]]>", "<!", "<?", "?>", "&", ";", "&#",
     "&lt;", "a", "task", "<a>", "</a>", "<task>", "</task>", "<b/>", "\n", " ", "x", "é", "]"]),
    max_size=60).map("".join))
def test_any_markup_is_a_document(text: str) -> None:
    check(text.encode())


def check(data: bytes) -> None:
    document = parse(data)
    lines = data.count(b"\n") + 1
    pending = list(document.roots)
    while pending:
        element = pending.pop()
        assert 1 <= element.line <= lines
        assert element.name.strip() == element.name != ""
        assert element.text.strip() == element.text
        assert not (element.empty and (element.text or element.children))
        pending += element.children
    for finding in document.findings:
        assert 0 <= finding.line <= lines
        assert finding.what.isprintable()
        assert finding.instead.isprintable()


# -- what an element's text says -------------------------------------------------------------


def value_of(function: object, written: str) -> tuple[object, list[str]]:
    findings: list[Finding] = []
    (element,) = parse(written.encode()).roots
    value = function(element, findings)  # type: ignore[operator]
    return value, [f"{each.level.value} {each.code}" for each in findings]


@pytest.mark.parametrize(("written", "value", "found"), [
    ("<x/>", True, []), ("<x>1</x>", True, []), ("<x> 0x10\n</x>", True, []),
    ("<x>-1</x>", True, []), ("<x>0</x>", False, []),
    ("<x></x>", False, ["warning not-a-flag"]), ("<x>true</x>", False, ["warning not-a-flag"]),
    ("<x>1.5</x>", False, ["warning not-a-flag"]), ("<x>1 </x>", True, []),
    ("<x>09</x>", False, ["warning not-a-flag"]), ("<x><y/></x>", False, ["warning not-a-flag"])])
def test_a_flag_is_an_empty_tag_or_a_whole_number(written: str, value: bool,
                                                  found: list[str]) -> None:
    assert value_of(values.boolean, written) == (value, found)


@pytest.mark.parametrize(("written", "value", "found"), [
    ("<x>512</x>", 512.0, []), ("<x> 6.5e2 </x>", 650.0, []), ("<x>-.5</x>", -0.5, []),
    ("<x></x>", 0.0, ["warning empty"]), ("<x/>", 0.0, ["warning empty"]),
    ("<x>512 MB</x>", 0.0, ["error not-a-number"]), ("<x>nan</x>", 0.0, ["error not-a-number"]),
    ("<x>1e999</x>", 0.0, ["error not-a-number"]), ("<x>1_0</x>", 0.0, ["error not-a-number"]),
    ("<x>{memory}</x>", 0.0, ["error placeholder"]), ("<x>@MEM@</x>", 0.0, ["error placeholder"]),
    ("<x><y>1</y></x>", 0.0, ["error not-a-number"]), ("<x>٣</x>", 0.0, ["error not-a-number"])])
def test_a_number_is_all_of_the_text(written: str, value: float, found: list[str]) -> None:
    assert value_of(values.number, written) == (value, found)


@pytest.mark.parametrize(("written", "value", "found"), [
    ("<x>80</x>", 80, []), ("<x>0x50</x>", 80, []), ("<x>0120</x>", 80, []), ("<x>+1</x>", 1, []),
    ("<x>8.0</x>", 0, ["error not-a-number"]), ("<x/>", 0, ["warning empty"]),
    ("<x>4294967296</x>", 0, ["error out-of-range"]),
    ("<x>99999999999999999999999</x>", 0, ["error not-a-number"])])
def test_a_whole_number_is_read_as_c_reads_it(written: str, value: int, found: list[str]) -> None:
    assert value_of(values.integer, written) == (value, found)


@pytest.mark.parametrize(("written", "value", "found"), [
    ("<x>a</x>", "a", []), ("<x>results/progress</x>", "results/progress", []),
    ("<x>./a//b/</x>", "a/b", []), ("<x>a b ü</x>", "a b ü", []),
    ("<x>/etc/passwd</x>", None, ["error bad-path"]), ("<x>../a</x>", None, ["error bad-path"]),
    ("<x>a/../../b</x>", None, ["error bad-path"]), ("<x>a&#10;b</x>", None, ["error bad-path"]),
    ("<x>a&#27;b</x>", None, ["error bad-path"]),
    ("<x>a&#x9b;b</x>", None, ["error bad-path"]), ("<x>.</x>", None, ["error bad-path"]),
    ("<x>C:\\a</x>", None, ["error bad-path"]), ("<x>..\\a</x>", None, ["error bad-path"]),
    ("<x>" + "a" * 300 + "</x>", None, ["error bad-path"]), ("<x/>", None, ["warning empty"]),
    ("<x>{name}</x>", None, ["error placeholder"]), ("<x><y/></x>", None, ["error not-a-text"])])
def test_a_name_stays_below_its_folder(written: str, value: str | None, found: list[str]) -> None:
    assert value_of(values.name, written) == (value, found)


@given(st.text(max_size=40))
def test_any_text_is_a_name_below_the_folder_or_a_finding(text: str) -> None:
    findings: list[Finding] = []
    name = values.name(Element("x", 1, text), findings)
    assert (name is None) == bool(findings)
    if name is not None:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert not any(ord(c) < 32 for c in name)


def test_many_comments_before_the_next_tag_take_no_time() -> None:
    begun = time.process_time()
    parse(b"<v>" + (b"<task><a/><task>" + b"<!---->" * 570 + b"x") * 20)
    assert time.process_time() - begun < 1
