"""mkdocs' hooks: what the site has beside docs/, and that nothing in it is loaded from another server."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from benchmarks.report import history
from tools.site.docstrings import table_of_losses
from tools.site.links import COPIED, HISTORY, PAGES, ROOT, origin, relative, rewritten, source_page, wanted

COMMENT = re.compile(r"^<!--.*?-->$", re.MULTILINE)
LOADED = re.compile(
    r"<(?:script|img|iframe|link(?![^>]*rel=\"?(?:canonical|next|prev)))[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)"
)


def on_files(files, config):
    for page, file in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text()))
    files.append(File.generated(config, HISTORY, content=history.page()))
    pages = [(file.content_string, origin(file.src_uri)) for file in files.documentation_pages()]
    for path in sorted({path for text, beside in pages for path in wanted(text, beside)}):
        if (ROOT / path).suffix in COPIED:
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, f"source/{path}.md", content=source_page(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    markdown = rewritten(markdown, lambda target: relative(target, uri)).replace("<!-- losses -->", table_of_losses())
    return COMMENT.sub("\n", markdown)  # marks of tables: in Python-Markdown a table has to begin a paragraph


def on_post_build(config):
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        for address in LOADED.findall(path.read_text()):
            raise PluginError(f"{path} loads {address}: the site is to need no other server")
