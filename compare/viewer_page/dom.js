// ---------------------------------------------------------------- elements
// Text of episodes goes into the page through `say` alone, as text nodes.

// What would not be seen, or would turn the text around it: controls, direction marks, separators, fillers,
// tags, lone surrogates. Joiners and variation selectors stay, which emoji and scripts are made with.
const UNSEEN = new RegExp('(?![\\t\\n\\u200c\\u200d\\ufe00-\\ufe0f])'
  + '[\\p{Cc}\\p{Cs}\\p{Zl}\\p{Zp}\\p{Default_Ignorable_Code_Point}\\u2800\\ufff9-\\ufffb]', 'gu');

function codePoint(letter) {
  return 'U+' + letter.codePointAt(0).toString(16).toUpperCase().padStart(4, '0');
}

// Appends a text to an element; unseen characters become marks with their code point.
function say(element, text) {
  text = String(text);
  let end = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > end) element.append(text.slice(end, match.index));
    const mark = document.createElement('span');
    mark.className = 'unseen';
    mark.textContent = codePoint(match[0]);
    element.append(mark);
    end = match.index + match[0].length;
  }
  if (end < text.length) element.append(end ? text.slice(end) : text);
  return element;
}

// The same in places that hold no elements: options of a menu, labels.
const plain = (text) => String(text).replace(UNSEEN, (letter) => `[${codePoint(letter)}]`);

function h(name, settings, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(settings || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else if (key === 'class') element.className = value;
    else if (key === 'data') Object.assign(element.dataset, value);
    else if (key === 'style') for (const [n, v] of Object.entries(value)) element.style.setProperty(n, v);
    else element.setAttribute(key, value === true ? '' : value);
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    if (child instanceof Node) element.append(child);
    else say(element, child);
  }
  return element;
}

const $ = (id) => document.getElementById(id);

function fill(element, ...children) {
  element.replaceChildren();
  element.append(...children.flat(3).filter(Boolean));
  return element;
}

// ---------------------------------------------------------------- numbers and marks

const count = (n) => n.toLocaleString('en-GB');
const minus = (text) => text.replace('-', '−');
const decimal = (value, digits = 2) => (value === null || value === undefined ? '–' : minus(value.toFixed(digits)));
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const signed = (value) => (value > 0 ? '+' : '') + decimal(value);

function result(i) {
  const right = column.right[i];
  return right === null ? 'unscored' : right ? 'right' : 'wrong';
}

const SYMBOLS = {right: '✓', wrong: '✗', unscored: '–'};

function badge(i, long) {
  const name = result(i);
  return h('span', {class: `badge ${name}`, 'aria-label': long ? null : name, role: long ? null : 'img'},
    SYMBOLS[name], long ? ` ${name}` : '');
}

function armDot(i) {
  return dot(armOf(i).colour);
}

function dot(colour) {
  return h('span', {class: 'dot', 'aria-hidden': 'true', style: {'--arm': colour}});
}

function chip(text, kind, title) {
  return h('span', {class: `chip ${kind || ''}`, title}, text);
}

function toast(text) {
  const box = $('toast');
  box.textContent = text;
  box.classList.add('shown');
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => box.classList.remove('shown'), 2200);
}
