// Light or dark: the system's preference, or what the user chose with the button.
import { createContext } from "preact";
import { useEffect, useState } from "preact/hooks";

export type Theme = "light" | "dark";

export const ThemeContext = createContext<Theme>("light");
const STORED = "carry.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function preferred(): Theme {
  const chosen = localStorage.getItem(STORED);
  return chosen === "light" || chosen === "dark" ? chosen : system.matches ? "dark" : "light";
}

/** The theme in force, and the button that changes it. */
export function useTheme() {
  const [theme, setTheme] = useState(preferred);
  useEffect(() => system.addEventListener("change", () => setTheme(preferred())), []);
  document.documentElement.dataset.theme = theme;
  const other: Theme = theme === "dark" ? "light" : "dark";
  const change = () => {
    localStorage.setItem(STORED, other);
    setTheme(other);
  };
  const button = <button onClick={change}>{other === "dark" ? "Dark theme" : "Light theme"}</button>;
  return { theme, button };
}
