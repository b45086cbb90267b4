"""The browser of samples in a terminal: a list, and below it the sample under the cursor."""

from rich.console import JustifyMethod
from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Footer, Static

from rlhf_fast.monitor.samples import KEYS, Order, Samples
from rlhf_fast.monitor.samples_text import COLUMNS, SHADES, body, heading
from rlhf_fast.text import one_line

WIDTHS = {"step": 7, "score": 8, "KL": 8, "length": 8, "ended": 5}
SHADE_ORDER = (None, *SHADES)


class SamplesApp(App[None]):
    """
    Args:
        title: what is shown, such as the path of the log.
        samples: what to show.
        order: the order to begin with.
        diff: begin with the diff.
    """

    TITLE = "rlhf-fast samples"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title { height: 1; text-style: bold; background: $primary; color: $text; padding: 0 1; }
    DataTable { height: 40%; min-height: 4; }
    #pane { height: 1fr; border-top: solid $primary; padding: 0 1; }
    #pane:focus { border-top: heavy $accent; }
    #heading { height: auto; }
    #body { height: auto; }
    """
    BINDINGS = [
        Binding("s", "sort", "Sort by"),
        Binding("r", "reverse", "Reverse"),
        Binding("d", "diff", "Diff"),
        Binding("t", "tokens", "Tokens"),
        Binding("space", "page(1)", "Page", key_display="space"),
        Binding("b", "page(-1)", "Back"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, title: str, samples: Samples, order: Order, *, diff: bool) -> None:
        super().__init__()
        self._title, self._samples, self._order, self._diff = title, samples, order, diff
        self._shade = 0
        self._places: list[int] = []  # positions of the rows, in the order of the list

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        yield DataTable(cursor_type="row", zebra_stripes=True)
        with VerticalScroll(id="pane"):
            yield Static(id="heading", markup=False)
            yield Static(id="body", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(DataTable).focus()

    def on_resize(self) -> None:
        self._fill()

    def _fill(self) -> None:
        """Writes the list in the present order, with the cursor on the sample where it was."""
        table = self.query_one(DataTable)
        place = self._places[table.cursor_row] if self._places and table.row_count else None
        self._places = self._samples.sorted(self._order)
        table.clear(columns=True)
        left = self.size.width - sum(width + 2 for width in WIDTHS.values()) - 4
        for name, _ in COLUMNS:
            arrow = (" ↓" if self._order.descending else " ↑") if name.lower() == self._order.key else ""
            justify: JustifyMethod = "left" if name == "response" else "right"
            table.add_column(Text(name + arrow, justify=justify), width=WIDTHS.get(name, max(20, left)), key=name)
        for position in self._places:
            row = self._samples.rows[position]
            cells = (
                Text(cell(row), no_wrap=True, overflow="ellipsis", justify="left" if name == "response" else "right")
                for name, cell in COLUMNS
            )
            table.add_row(*cells, key=str(position))
        table.move_cursor(row=self._places.index(place) if place is not None else 0)
        words = f"{one_line(self._title)}: {len(self._places)} samples, {self._order.words}"
        self.query_one("#title", Static).update(Text(words, no_wrap=True, overflow="ellipsis"))
        self._show()

    @on(DataTable.RowHighlighted)
    def _show(self) -> None:
        place = self._places[self.query_one(DataTable).cursor_row]
        row, other = self._samples.rows[place], self._samples.others[place]
        text = body(row, other, at=self._samples.at, diff=self._diff, shade=SHADE_ORDER[self._shade])
        self.query_one("#heading", Static).update(heading(row))
        self.query_one("#body", Static).update(text)
        self.query_one("#pane", VerticalScroll).scroll_home(animate=False)

    @on(DataTable.HeaderSelected)
    def _header(self, event: DataTable.HeaderSelected) -> None:
        key = str(event.column_key.value).lower()
        if key in KEYS:
            self._order = Order(key, not self._order.descending if key == self._order.key else True)
            self._fill()

    def action_sort(self) -> None:
        self._order = Order(KEYS[(KEYS.index(self._order.key) + 1) % len(KEYS)])
        self._fill()

    def action_reverse(self) -> None:
        self._order = Order(self._order.key, not self._order.descending)
        self._fill()

    def action_diff(self) -> None:
        self._diff = not self._diff
        self._show()

    def action_tokens(self) -> None:
        self._shade, self._diff = (self._shade + 1) % len(SHADE_ORDER), False
        self._show()

    def action_page(self, pages: int) -> None:
        pane = self.query_one("#pane", VerticalScroll)
        pane.scroll_relative(y=pages * max(1, pane.size.height - 1), animate=False)
