// What the user prefers: how models sample, and light or dark. Kept in the browser.

import { keep, kept } from "./conversations.js";
import { $ } from "./parts.js";

const SETTINGS = "elm-mlx/settings";
const THEME = "elm-mlx/theme";
const THEMES = ["auto", "light", "dark"];
const DEFAULTS = { temperature: 0.7, top_p: 0.9 }; // those of `elm-mlx chat`

const inputs = () => [...document.querySelectorAll("#settings input")];

export function listenToPreferences() {
  for (const input of inputs()) input.oninput = () => keep(SETTINGS, readSettings());
  $("reset").onclick = () => showSettings({});
  $("theme").onclick = () => showTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
  showSettings(kept(SETTINGS) ?? {});
  showTheme(kept(THEME));
}

/** The sampling settings as fields of a request: the user's, then the model's own, then the defaults. */
export const samplingFor = (model) => ({ ...DEFAULTS, ...model.sampling, ...readSettings() });

/** Shows in the fields that are empty what holds for a model. */
export function showDefaults(model) {
  const defaults = { ...DEFAULTS, ...model?.sampling };
  for (const input of inputs()) input.placeholder = defaults[input.name] ?? "";
}

function readSettings() {
  const set = inputs().filter((input) => input.value !== "" && input.validity.valid);
  return Object.fromEntries(set.map((input) => [input.name, input.valueAsNumber]));
}

function showSettings(settings) {
  for (const input of inputs()) input.value = settings[input.name] ?? "";
  keep(SETTINGS, readSettings());
}

function showTheme(chosen) {
  const theme = THEMES.includes(chosen) ? chosen : "auto";
  document.documentElement.dataset.theme = theme;
  $("theme").lastElementChild.textContent = theme[0].toUpperCase() + theme.slice(1);
  keep(THEME, theme);
}
