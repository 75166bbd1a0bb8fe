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
const digest = (...contents) =>
  contents.reduce((hash, content) => hash.update(content), createHash("sha256")).digest("hex");

// the bundled packages' licences have to be distributed with them
const packages = Object.keys(metafile.inputs).flatMap((path) => /node_modules\/([^/]+)/.exec(path)?.[1] ?? []);
const texts = [...new Set(packages)].sort().map(async (name) =>
  `${name}\n\n${await readFile(`${web}node_modules/${name}/LICENSE`, "utf8")}\n`,
);
const licenses = (await Promise.all(texts)).join("\n");
const licensesName = `licenses-${digest(licenses).slice(0, 8).toUpperCase()}.txt`;
await writeFile(`${target}/${licensesName}`, licenses);

// the page names its sources, so that a test without Node.js notices a bundle that is out of date
const names = (await readdir(`${web}src`)).map((name) => `src/${name}`).sort();
const sources = ["build.mjs", "package-lock.json", ...names].map((name) => readFile(web + name));
const outputs = Object.keys(metafile.outputs).map((path) => basename(path));
const html = (await readFile(`${web}src/index.html`, "utf8"))
  .replace("SOURCES", digest(...(await Promise.all(sources))))
  .replace("main.js", outputs.find((name) => name.endsWith(".js")))
  .replace("main.css", outputs.find((name) => name.endsWith(".css")))
  .replace("licenses.txt", licensesName);
await writeFile(`${target}/index.html`, html);
