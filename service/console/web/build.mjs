// Bundles the console into a folder, by default the committed ../assets: page, script and style sheet.
// The same sources and packages give the same bytes; names contain a hash of the content.
import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { basename, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const web = fileURLToPath(new URL(".", import.meta.url));
const target = resolve(process.argv[2] ?? `${web}../assets`);

await rm(target, { recursive: true, force: true });
await mkdir(target, { recursive: true });
const { metafile } = await build({
  absWorkingDir: web,
  entryPoints: ["src/main.tsx", "src/style.css"],
  entryNames: "console-[hash]",
  outdir: target,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  charset: "utf8",
  jsx: "automatic",
  jsxImportSource: "preact",
  metafile: true,
});
const outputs = Object.keys(metafile.outputs).map((path) => basename(path));

// the page names its sources, so that a test without Node.js notices a bundle that is out of date
const sources = createHash("sha256");
const names = (await readdir(`${web}src`)).map((name) => `src/${name}`);
for (const name of ["build.mjs", "package-lock.json", ...names.sort()])
  sources.update(await readFile(web + name));
const html = (await readFile(`${web}src/index.html`, "utf8"))
  .replace("SOURCES", sources.digest("hex"))
  .replace("main.js", outputs.find((name) => name.endsWith(".js")))
  .replace("main.css", outputs.find((name) => name.endsWith(".css")));
await writeFile(`${target}/index.html`, html);
