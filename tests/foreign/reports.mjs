// Pages of reports in Chromium: node reports.mjs SCREENSHOTS CHROMIUM URL NAME ...
// Exits with 1 for what chromium.mjs refuses, and for a page that does not sort by keyboard or has no hover values.
import path from "node:path";
import { axeVersion, checkLooks, withPage } from "./chromium.mjs";

const [screenshots, executablePath, url, ...names] = process.argv.slice(2);
const problems = [];

for (const name of names) {
  const own = [];
  await withPage(executablePath, url, own, async (page) => {
    await page.goto(`${url}${name}/report.html`);

    // By keyboard alone: a table takes the focus, to be scrolled; then its first column sorts in both directions.
    const focused = (what) => page.evaluate((what) => document.activeElement.matches(what), what);
    await page.keyboard.press("Tab");
    if (!(await focused(".scroll"))) own.push("the first Tab does not reach a table");
    await page.keyboard.press("Tab");
    if (!(await focused("th button"))) own.push("the second Tab does not reach the head of a column");
    for (const order of ["ascending", "descending"]) {
      await page.keyboard.press("Enter");
      const [sorted, cells] = await page.evaluate(() => {
        const head = document.activeElement.closest("th");
        const rows = [...head.closest("table").tBodies[0].rows];
        return [head.getAttribute("aria-sort"), rows.map((row) => row.cells[head.cellIndex].textContent.trim())];
      });
      const wanted = [...cells].sort((a, b) => (order === "ascending" ? 1 : -1) * a.localeCompare(b));
      if (sorted !== order) own.push(`aria-sort is ${sorted}, not ${order}`);
      if (JSON.stringify(cells) !== JSON.stringify(wanted)) own.push(`not ${order}: ${cells.join(", ")}`);
    }

    // A value under the pointer.
    const mark = page.locator("[data-hover]").first();
    await mark.scrollIntoViewIfNeeded();
    const box = await mark.boundingBox();
    await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
    const tip = page.locator("#tip");
    if (!(await tip.isVisible()) || !(await tip.textContent())) own.push("no value under the pointer");
    await page.mouse.move(0, 0);

    await checkLooks(page, path.join(screenshots, name), own);
  });
  problems.push(...own.map((problem) => `${name}: ${problem}`));
}
if (problems.length) {
  console.error(problems.join("\n"));
  process.exit(1);
}
console.log(axeVersion);
