// Draws the charts and makes the downloads out of the tables that the page holds once.
(() => {
  const { config, tasks } = JSON.parse(document.getElementById("data").textContent);

  const field = (value) => {
    const text = value === null ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = ({ columns, rows }) =>
    [columns, ...rows].map((row) => `${row.map(field).join(",")}\n`).join("");

  for (const link of document.querySelectorAll("a[data-table]")) {
    const table = tasks[link.dataset.task].tables[link.dataset.table];
    link.href = URL.createObjectURL(new Blob([csv(table)], { type: "text/csv;charset=utf-8" }));
    link.hidden = false;
  }

  // Tables that are wider than their place say so, and show where they go on.
  const look = (scroll) => {
    const hidden = scroll.scrollWidth - scroll.clientWidth;
    scroll.parentElement.parentElement.classList.toggle("wider", hidden > 1);
    scroll.parentElement.parentElement.classList.toggle("more", hidden - scroll.scrollLeft > 1);
  };
  const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => look(target)));
  for (const scroll of document.querySelectorAll(".scroll")) {
    scroll.addEventListener("scroll", () => look(scroll), { passive: true });
    resized.observe(scroll);
  }

  const records = ({ columns, rows }, where) => {
    const wanted = Object.entries(where).map(([name, value]) => [columns.indexOf(name), value]);
    return rows
      .filter((row) => wanted.every(([at, value]) => row[at] === value))
      .map((row) => Object.fromEntries(columns.map((name, at) => [name, row[at]])));
  };

  const drawn = [];
  for (const { tables, specs, plots } of Object.values(tasks)) {
    for (const [id, { spec, table, where, label }] of Object.entries(plots)) {
      const datasets = { [table]: records(tables[table], where) };
      const options = {
        renderer: "svg",
        config,
        downloadFileName: id,
        actions: { export: true, source: false, compiled: false, editor: false },
      };
      drawn.push(vegaEmbed(`#${id}`, { ...specs[spec], description: label, datasets }, options));
    }
  }
  Promise.all(drawn).then((views) => {
    document.documentElement.dataset.charts = String(views.length);
  });
})();
