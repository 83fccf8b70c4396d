// ---------------------------------------------------------------- the page as a whole

const KEYS = [
  ['j  k', 'next and previous episode of the list'],
  ['←  →', 'earlier and later step of the same question and run'],
  ['/', 'search; Enter goes to the list'],
  ['1  2  3', 'episode, side by side, over training'],
  ['s', 'shading of tokens on and off'],
  ['f', 'fold and unfold results of tools'],
  ['x', 'side by side: swap the two; choose the pane with p'],
  ['c', 'copy a link to what is shown'],
  ['?', 'these keys'],
];

// Opens an episode: in the list's pane of the two, where two are shown.
function open(i, settings = {}) {
  if (i === null || i === undefined || i < 0) return;
  if (state.mode === 'side' && state.pane === 'b' && settings.fromList) state.other = i;
  else chosen = i;
  if (settings.fromList || settings.toEpisode) document.body.dataset.screen = 'episode';
  remember(!settings.fromList);
  drawRows();
  if (!settings.fromList) {
    scrollToChosen();
    drawRows();
  }
  return drawView();
}

function setMode(mode) {
  state.mode = mode;
  if (mode === 'side') state.other = chosen < 0 ? -1 : partner(chosen);
  state.pane = state.other === chosen ? 'b' : 'a';
  drawBar();
  remember(false);
  return drawView();
}

let searching = 0;
function refresh() {
  select();
  showFilters();
  drawSummary();
  drawSort();
  drawList();
  remember(true);
}

async function search(words) {
  filters.words = words;
  const mine = ++searching;
  if (words.trim()) $('search').classList.add('busy');
  const isDone = await lookFor(words);
  if (!isDone || mine !== searching) return;
  $('search').classList.remove('busy');
  $('list').scrollTop = 0;
  refresh();
  highlight();
}

// ---------------------------------------------------------------- the address
// What is shown is in the address behind #, so that a link leads to it.

const FILTER_VALUES = {
  arm: [() => index.arms.map((arm) => arm.name)], run: [() => index.runs.map((run) => run.name)],
  kind: [() => index.kinds], stop: [() => index.stops],
};

function address() {
  const parts = new URLSearchParams();
  if (state.mode !== 'one') parts.set('view', state.mode);
  if (chosen >= 0) put(parts, '', chosen);
  if (state.mode === 'side' && state.other >= 0) put(parts, '2', state.other);
  for (const [name, value] of Object.entries(filters)) {
    if (value !== '') parts.set(`f.${name}`, FILTER_VALUES[name] ? FILTER_VALUES[name][0]()[+value] : value);
  }
  if (order.by !== 'step' || !order.down) parts.set('sort', (order.down ? '-' : '') + order.by);
  return `#${parts}`;
}

function put(parts, suffix, i) {
  parts.set(`run${suffix}`, runName(i));
  parts.set(`step${suffix}`, column.step[i]);
  parts.set(`question${suffix}`, index.questions[column.question[i]].id);
  if (column.is_training[i]) parts.set(`phase${suffix}`, 'train');
  if (copyOf(i)) parts.set(`copy${suffix}`, copyOf(i));
}

function take(parts, suffix) {
  const run = index.runs.findIndex((one) => one.name === parts.get(`run${suffix}`));
  const q = index.questions.findIndex((one) => one.id === parts.get(`question${suffix}`));
  if (run < 0 || q < 0) return -1;
  const isTraining = parts.get(`phase${suffix}`) === 'train' ? 1 : 0;
  for (let k = index.firstOf[q]; k < index.firstOf[q + 1]; k++) {
    if (column.run[k] === run && column.is_training[k] === isTraining && column.step[k] === +parts.get(`step${suffix}`)
      && copyOf(k) === +(parts.get(`copy${suffix}`) || 0)) return k;
  }
  return -1;
}

function remember(isSmall) {
  const now = address();
  if (now === (location.hash || '#')) return;
  history[isSmall ? 'replaceState' : 'pushState']({screen: document.body.dataset.screen}, '', now);
}

async function restore() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.mode = MODES[parts.get('view')] ? parts.get('view') : 'one';
  chosen = take(parts, '');
  state.other = take(parts, '2');
  for (const name of Object.keys(filters)) {
    const value = parts.get(`f.${name}`) ?? '';
    const number = FILTER_VALUES[name] ? FILTER_VALUES[name][0]().indexOf(value) : -1;
    filters[name] = FILTER_VALUES[name] && value !== '' ? (number < 0 ? '' : String(number)) : value;
  }
  if (!FAULTS[filters.fault]) filters.fault = '';
  const sort = parts.get('sort') || '-step', by = sort.replace(/^-/, '');
  if (ORDERS[by]) Object.assign(order, {by, down: sort.startsWith('-')});
  if (filters.words.trim().toLowerCase() !== foundWords) await lookFor(filters.words);
  const isLost = parts.has('question') && chosen < 0;
  select();
  if (chosen < 0 && shown.length && !isLost) chosen = shown[0];
  document.body.dataset.screen = parts.has('question') ? 'episode' : 'list';
  drawBar();
  showFilters();
  drawSummary();
  drawSort();
  drawList();
  scrollToChosen();
  drawRows();
  await drawView();
  if (isLost) fill($('view'), h('p', {class: 'empty'}, 'The episode of this address is not in this page.'));
}

async function copyLink() {
  const link = location.href.split('#')[0] + address();
  try {
    await navigator.clipboard.writeText(link);
    toast('Link copied');
  } catch {
    toast('The link is in the address bar');
  }
}

// ---------------------------------------------------------------- bar, keys, pointers

function drawBar() {
  $('title').textContent = plain(document.title);
  fill($('modes'), Object.entries(MODES).map(([mode, words]) => h('button', {
    type: 'button', 'aria-pressed': String(state.mode === mode), data: {mode}, onclick: () => setMode(mode),
  }, words)));
  const isShaded = !document.body.classList.contains('unshaded');
  fill($('tools'),
    h('button', {type: 'button', id: 'shading', 'aria-pressed': String(isShaded), onclick: toggleShading}, 'Shading'),
    h('button', {type: 'button', id: 'link', onclick: copyLink}, 'Link'),
    h('button', {type: 'button', id: 'theme', onclick: nextTheme, 'aria-label': `Colours: ${theme}`}, {auto: '◐', light: '☀', dark: '☾'}[theme]),
    h('button', {type: 'button', id: 'keys', 'aria-label': 'Keys', onclick: showKeys}, '?'));
}

let theme = 'auto';
function nextTheme() {
  theme = {auto: 'light', light: 'dark', dark: 'auto'}[theme];
  if (theme === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  toast(`Colours: ${theme}`);
  drawBar();
}

function toggleShading() {
  document.body.classList.toggle('unshaded');
  drawBar();
}

function toggleFolds() {
  isFolded = !isFolded;
  for (const box of document.querySelectorAll('#view .observation')) box.open = !isFolded;
}

function swap() {
  if (state.mode !== 'side') return;
  [chosen, state.other] = [state.other, chosen];
  remember(true);
  drawRows();
  drawView();
}

function showKeys() {
  const close = h('button', {type: 'button', onclick: () => $('help').close()}, 'Close');
  fill($('help'), h('h2', {}, 'Keys'), h('dl', {}, KEYS.map(([keys, words]) => [h('dt', {}, keys.split('  ').map((key) => h('kbd', {}, key))), h('dd', {}, words)])), close);
  $('help').showModal();
}

function byStep(by) {
  if (chosen < 0) return;
  const steps = ofRun(chosen, column.run[chosen]);
  open(steps[steps.indexOf(chosen) + by], {quiet: true});
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $('help').open) return;
  if (event.target.matches('input, select, textarea')) {
    if (event.key === 'Escape') event.target.blur();
    if (event.key === 'Enter' && event.target.id === 'search') $('list').focus();
    return;
  }
  const isInList = event.target.id === 'list';
  const actions = {
    j: () => move(1), k: () => move(-1),
    ArrowDown: isInList ? () => move(1) : null, ArrowUp: isInList ? () => move(-1) : null,
    Home: isInList ? () => move(-Infinity) : null, End: isInList ? () => move(Infinity) : null,
    Enter: isInList ? () => { document.body.dataset.screen = 'episode'; $('view').focus(); } : null,
    ArrowLeft: () => byStep(-1), ArrowRight: () => byStep(1),
    '/': () => { document.body.dataset.screen = 'list'; $('search').focus(); },
    1: () => setMode('one'), 2: () => setMode('side'), 3: () => setMode('time'),
    s: toggleShading, f: toggleFolds, x: swap, c: copyLink, '?': showKeys,
    p: () => { if (state.mode === 'side') { state.pane = state.pane === 'a' ? 'b' : 'a'; drawView(); } },
    Escape: () => { document.body.dataset.screen = 'list'; hideTip(); },
  };
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function move(by) {
  const i = Number.isFinite(by) ? neighbour(by) : shown[by > 0 ? shown.length - 1 : 0];
  if (state.mode === 'side') state.other = state.pane === 'a' && i >= 0 ? partner(i) : state.other;
  open(i, {quiet: true});
}

function hideTip() {
  $('tip').hidden = true;
}

function listen() {
  let timer = 0;
  $('search').addEventListener('input', (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => search(event.target.value), 200);
  });
  $('list').addEventListener('scroll', onScroll, {passive: true});
  addEventListener('resize', drawRows);
  $('list').addEventListener('click', (event) => {
    const at = event.target.closest('[data-episode]');
    if (!at) return;
    const i = +at.dataset.episode;
    if (state.mode === 'side' && state.pane === 'a') state.other = partner(i);
    open(i, {fromList: true});
  });
  $('back').addEventListener('click', () => { document.body.dataset.screen = 'list'; drawRows(); });
  $('groups').addEventListener('toggle', drawSummary);
  $('view').addEventListener('pointerover', (event) => {
    const token = event.target.closest('.token[data-logprob]');
    if (token) showTip(token); else hideTip();
  });
  $('view').addEventListener('click', (event) => {
    const token = event.target.closest('.token[data-logprob]');
    if (token) showTip(token);
  });
  $('view').addEventListener('pointerleave', hideTip);
  $('view').addEventListener('scroll', hideTip, {passive: true});
  document.addEventListener('keydown', onKey);
  addEventListener('popstate', restore);
  addEventListener('beforeprint', () => { for (const box of document.querySelectorAll('#view details')) box.open = true; });
}

async function start() {
  if (typeof DecompressionStream === 'undefined') {
    fill($('view'), h('p', {class: 'empty'}, 'This browser is too old for the page: it needs Chrome 103, Firefox 113 or Safari 16.4.'));
    return;
  }
  await openIndex();
  drawFilters();
  listen();
  await restore();
  document.body.dataset.ready = 'true';
}

start();
